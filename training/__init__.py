"""What a run needs around the model: schedule, optimizer, checkpoints, run folder, tracking, processes.

Nothing here knows a task or a model by name, and nothing here imports another package of the repository.
"""

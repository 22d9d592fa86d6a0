"""Tasks: raw data into batches, model outputs into the official score."""

"""A case made concrete: its inputs, its contenders as functions of them, and what their results must be."""

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from benchmarks import flex
from benchmarks.agreement import TOLERANCE, Disagreement, check, relative_error
from benchmarks.cases import BOTH, FORWARD, OURS, make_call
from benchmarks.gpu_case import FLEX_BEST, FLEX_BLOCK, MODULE, Case

SLICE = 32  # rows of each part that is compared with the float64 reference


class Problem:
    """Random inputs of a case on a device, seeded; ours runs before its peers. Each mechanism has its own class."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.dtype = getattr(torch, case.dtype)
        self.tolerance = TOLERANCE[case.dtype]
        generator = torch.Generator(device).manual_seed(1)

        def normal(*sizes):
            tensor = torch.randn(*sizes, device=device, generator=generator, dtype=torch.float32)
            return tensor.to(self.dtype)

        # by name on a GPU: what is timed there is never another path
        self.impl = "auto" if device == "cpu" else "triton"
        batch, seq_len = case.batch, case.seq_len
        if case.kind == MODULE:
            self.inputs = [normal(batch, seq_len, case.dim)]
        else:
            self.inputs = [normal(batch, case.num_rows, case.num_heads, case.head_dim)]
            self.inputs += [normal(batch, seq_len, case.num_kv_heads, case.head_dim) for _ in range(2)]
        self.gradient = normal(*self.inputs[0].shape)
        self.expected: dict[str, list[torch.Tensor]] = {}
        self._truth: tuple | None = None
        self._made: dict[str, tuple[Callable, float]] = {}
        self._forward_options: dict = {}

    def _attention(self, name: str) -> Callable:
        """A contender as a function of query, key and value."""
        raise NotImplementedError

    def _module(self, name: str) -> Callable:
        """A contender of a module case as a function of x, all with one set of seeded weights."""
        raise NotImplementedError

    def _flex_maker(self) -> flex.Maker:
        """FlexAttention of the case from the block size of its mask and kernel options."""
        raise NotImplementedError

    def _reference(self, query, key, value, first: int, last: int) -> torch.Tensor:
        """Rows first..last of the result, by the plainest formula; inputs in float64, all of them."""
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        """What a forward call finds in memory; a backward one finds the output's gradient beside it."""
        return sum(tensor.nbytes for tensor in self.inputs)

    def is_compared(self, name: str) -> bool:
        """Whether the contender computes the function of the case, rather than one timed beside it."""
        return self.case.as_computed_by(name) == self.case

    def contender(self, name: str, passes: str, clock: Callable, out_of_time: Callable) -> tuple[Callable, str | None]:
        """(function of the inputs, a note); made once, and where options are searched for, once for each of the passes.

        The seconds of making are in `made_in(name)`.
        """
        start = time.perf_counter()
        if name == FLEX_BEST:
            best = self._search(passes, clock, out_of_time)
            self._made[name] = best.attention, time.perf_counter() - start
            return best.attention, f"the fastest: {best}"
        if name not in self._made:
            function = self._module(name) if self.case.kind == MODULE else self._attention(name)
            self._made[name] = function, time.perf_counter() - start
        return self._made[name][0], None

    def made_in(self, name: str) -> float:
        """Seconds that masks, parameters or the search for options took, before the first call."""
        return self._made[name][1]

    def _candidates(self, passes: str) -> Iterable[tuple[int, dict]]:
        """(block size of the mask, kernel options) among which FlexAttention's best are looked for."""
        return flex.FORWARD_OPTIONS if passes == FORWARD else flex.backward_candidates(self._forward_options)

    def _search(self, passes, clock, out_of_time):
        candidates = self._candidates(passes)

        def agrees(attend):
            try:
                results = _listed(self.call(FLEX_BEST, attend, passes)())
                check(FLEX_BEST, results, self.expected[passes], self.tolerance[passes])
            except Disagreement:
                return False
            return True

        found = flex.search(
            candidates,
            self._flex_maker(),
            make_timed_call=lambda attend: self.call(FLEX_BEST, attend, passes),
            agrees=agrees,
            clock=clock,
            out_of_time=out_of_time,
        )
        if passes == FORWARD:  # backward needs the mask's default blocks
            wide = (one.options for one in found if one.block_size == FLEX_BLOCK)
            self._forward_options = next(wide, {})
        return found[0]

    def call(self, name: str, function: Callable, passes: str, gradient: torch.Tensor | None = None) -> Callable:
        """The call to time: its result is the output (forward), or the gradients of inputs and parameters.

        A contender that is timed at another length gets the first rows of the inputs.
        """
        length = self.case.as_computed_by(name).seq_len
        gradient = self.gradient if gradient is None else gradient
        *tensors, gradient = (tensor[:, :length].contiguous() for tensor in (*self.inputs, gradient))
        inputs = [tensor.detach().requires_grad_(passes == BOTH) for tensor in tensors]
        return make_call(function, inputs, passes, _parameters(function), gradient)

    def check(self, name: str, function: Callable, passes: str, result) -> tuple[float | None, float | None]:
        """(largest difference from ours, relative error against float64); Disagreement where either is too large.

        The first result of ours is what the others are compared with. A module is compared with its peer alone.
        """
        if not self.is_compared(name):
            return None, None
        results = _comparable(function, _listed(result), passes)
        difference = None
        if name == OURS:
            self.expected[passes] = results
        else:
            difference = check(name, results, self.expected[passes], self.tolerance[passes])
        return difference, None if self.case.kind == MODULE else self._reference_error(name, function, passes, result)

    def _reference_error(self, name, function, passes, result):
        rows, truth = self.truth
        if passes == FORWARD:
            found = [result[:, rows]]
        else:
            query, key, value = self.call(name, function, passes, self._gradient_at(rows))()
            found = [query[:, rows], key, value]
        errors = [relative_error(mine, exact) for mine, exact in zip(found, truth[passes], strict=True)]
        worst = max(errors)
        if not worst <= self.tolerance[passes]:
            raise Disagreement(
                f"{name}: {passes} is {worst:.3g} from the float64 reference, more than {self.tolerance[passes]:.3g}: "
                "it is not timed"
            )
        return worst

    @property
    def truth(self) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Rows that are compared, and by pass what the float64 reference gives for them: out; dq, dk, dv.

        The gradients are those of an output gradient that is zero at all other rows.
        """
        if self._truth is None:
            pieces = _pieces(self.inputs[0].shape[1])
            rows = torch.cat([torch.arange(*piece) for piece in pieces]).to(self.device)
            query, key, value = (tensor.double().requires_grad_() for tensor in self.inputs)
            out, gradients = [], [torch.zeros_like(tensor) for tensor in (query, key, value)]
            for first, last in pieces:
                part = self._reference(query, key, value, first, last)
                wanted = torch.autograd.grad(part, (query, key, value), self.gradient[:, first:last].double())
                gradients = [total + extra for total, extra in zip(gradients, wanted, strict=True)]
                out.append(part.detach())
            by_query = [gradients[0][:, rows], *gradients[1:]]
            self._truth = rows, {FORWARD: [torch.cat(out, dim=1)], BOTH: by_query}
        return self._truth

    def _gradient_at(self, rows):
        alone = torch.zeros_like(self.gradient)
        alone[:, rows] = self.gradient[:, rows]
        return alone


def _pieces(num_rows):
    """[first, last) of the rows that are compared: at the start, in the middle, at the end; all where they are few."""
    if num_rows <= 4 * SLICE:
        return [(0, num_rows)]
    middle = num_rows // 2 - 5  # on no tile's border
    return [(0, SLICE), (middle, middle + SLICE), (num_rows - SLICE, num_rows)]


def _named_parameters(function):
    module = getattr(function, "func", None)
    named = list(module.named_parameters()) if isinstance(module, torch.nn.Module) else []
    return sorted((name.removeprefix("attention."), parameter) for name, parameter in named)


def _parameters(function) -> Sequence[torch.Tensor]:
    return [parameter for _, parameter in _named_parameters(function)]


def _comparable(function, results, passes):
    """Without the gradients of key biases: those add one number to all scores of a row, so they are rounding alone."""
    if passes == FORWARD:
        return results
    names = [""] * (len(results) - len(_parameters(function))) + [name for name, _ in _named_parameters(function)]
    kept = zip(names, results, strict=True)
    return [result for name, result in kept if name not in ("key.bias", "key_global.bias")]


def _listed(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)

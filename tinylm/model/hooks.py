"""Hook points: named places in a network where functions can read and replace activations.

A network that derives from `HookedModule` has a `HookPoint` for each named activation. `hooks` temporarily attaches functions to
hook points, and `run_with_cache` returns a forward pass's activations. Names are TransformerLens names without `hook_`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

HookFunction = Callable[[Tensor, str], Tensor | None]
"""Receives an activation and its hook point's name. Returns a replacement of the same shape, or None to keep the activation."""
NameFilter = Iterable[str] | Callable[[str], bool]
"""Names, where `*` matches any characters, or a predicate on names."""

_PARTS = {"attention": "attn", "feed_forward": "mlp"}
"""Abbreviations of submodule names in hook names."""
_TRANSFORMER_LENS = (
    (r"\bhook_", ""),
    (r"\battn_scores\b", "scores"),
    (r"\brot_([qk])\b", r"\1"),
    (r"\bln_final\.normalized$", "final_norm"),
)
"""Patterns and replacements that convert a TransformerLens name to a tinylm name."""


class HookPoint(nn.Module):
    """Returns its input unchanged unless functions are attached. Copies have no functions attached."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Callable[[Tensor], Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Bypass `nn.Module.__call__`, which would take 1% of a tiny model's step time."""
        return self.forward(x) if self.functions else x

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "functions": []}  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> HookPoint:
        """Create a new hook point, because copying each attribute would dominate the time to copy a small network."""
        return HookPoint().train(self.training)


class ActivationCache(dict[str, Tensor]):
    """Activations by hook point name, in the order of the forward pass. Lookups also accept TransformerLens names."""

    def __missing__(self, name: str) -> Tensor:
        canonical = _canonical(name)
        if canonical not in self:
            raise KeyError(f"{name} is not in the cache{_suggestion(canonical, self)}")
        return self[canonical]


class HookedModule(nn.Module):
    """A network with hook points.

    The path of a hook point determines its name: `hook_q` of `blocks.0.attention` is `blocks.0.attn.q`. While functions are
    attached, the submodules run without torch.compile or activation checkpointing, so every function is called once per forward
    pass.
    """

    recompute = False

    def hook_names(self) -> list[str]:
        """Return the names of all hook points, in the order of the forward pass."""
        return list(self._hook_points())

    @contextmanager
    def hooks(self, functions: Mapping[str, HookFunction]) -> Iterator[None]:
        """Attach functions to hook points inside the `with` statement. Contexts can be nested; inner functions are called last.

        In the keys, `*` matches any characters. Each function receives a copy of the activation, which it can modify in place, and
        the hook point's name. If it returns a tensor, that tensor replaces the activation. Gradients flow through the functions.
        Raises `ValueError` for unknown names, and in the forward pass if a replacement has a different shape.
        """
        points = self._hook_points()
        attached = [
            (points[name], _replacing(function, name)) for key, function in functions.items() for name in _matching([key], points)
        ]
        with self._attached(attached):
            yield

    @contextmanager
    def caching(self, names: NameFilter | None = None) -> Iterator[ActivationCache]:
        """Record the detached outputs of hook points during forward passes inside the `with` statement.

        `names` selects hook points as in `run_with_cache`. Each forward pass overwrites the previous activations.
        """
        points = self._hook_points()
        cache = ActivationCache()
        with self._attached([(points[name], _recording(cache, name)) for name in _matching(names, points)]):
            yield cache

    def run_with_cache(self, tokens: Tensor, names: NameFilter | None = None, **inputs: Any) -> tuple[Tensor, ActivationCache]:
        """Ids (batch, time) -> logits (batch, time, vocabulary) and detached activations by name.

        `names` selects hook points: a list of names (`*` matches any characters), a predicate on names, or None for all. `inputs`
        are additional arguments of `forward`. The activations have these shapes:

        - (batch, time, width): `embed`, `pos_embed`, `ngram_embed`, `resid_*`, `attn_out`, `mlp_out`, `final_norm`
        - (batch, time, heads, head width): `attn.q` and `attn.k` as the scores use them (normalized, rotated), `attn.v`, `attn.z`;
          keys and values have `n_kv_head` heads
        - (batch, heads, query, key): `attn.scores`, scaled and masked with -inf; `attn.pattern`, their softmax
        - (batch, time, hidden width): `mlp.pre` and `mlp.post`, before and after the activation function. For SwiGLU, `mlp.pre` is
          the gate and `mlp.pre_linear` the values

        Scores and patterns are computed by unfused attention, which rounds differently. Raises `ValueError` for unknown names.
        """
        with self.caching(names) as cache:
            logits: Tensor = self(tokens, **inputs)
        return logits, cache

    def _hook_points(self) -> dict[str, HookPoint]:
        return {_hook_name(path): module for path, module in self.named_modules() if isinstance(module, HookPoint)}

    @contextmanager
    def _attached(self, attached: list[tuple[HookPoint, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
        recompute = self.recompute
        compiled = [(module, module._compiled_call_impl) for module in self.modules() if module._compiled_call_impl is not None]
        try:
            self.recompute = False
            for module, _ in compiled:
                module._compiled_call_impl = None
            for point, function in attached:
                point.functions.append(function)
            yield
        finally:
            for point, function in attached:
                point.functions.remove(function)
            for module, call in compiled:
                module._compiled_call_impl = call
            self.recompute = recompute


def has_functions(network: nn.Module) -> bool:
    """Return whether functions are attached to any hook point of `network`."""
    return any(module.functions for module in network.modules() if isinstance(module, HookPoint))


def _hook_name(path: str) -> str:
    """Convert a hook point's module path to its name."""
    return ".".join(_PARTS.get(part, part.removeprefix("hook_")) for part in path.split("."))


def _canonical(name: str) -> str:
    """Convert a TransformerLens name to a tinylm name. Tinylm names are returned unchanged."""
    for pattern, replacement in _TRANSFORMER_LENS:
        name = re.sub(pattern, replacement, name)
    return name


def _matching(names: NameFilter | None, points: Mapping[str, HookPoint]) -> list[str]:
    """Return the names of the selected hook points, in the order of `points`. Raises `ValueError` if a name does not match any."""
    if names is None:
        return list(points)
    if callable(names):
        return [name for name in points if names(name)]
    selected: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        pattern = _canonical(name)
        matches = {point for point in points if fnmatchcase(point, pattern)}
        if not matches:
            raise ValueError(f"there is no hook point {name}{_suggestion(pattern, points)}")
        selected |= matches
    return [name for name in points if name in selected]


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; hook_names() lists all names"


def _replacing(function: HookFunction, name: str) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        copy = x.clone()
        result = function(copy, name)
        if result is None:
            return copy
        if result.shape != x.shape:
            raise ValueError(f"the function for {name} must return shape {tuple(x.shape)}, not {tuple(result.shape)}")
        return result

    return replace


def _recording(cache: ActivationCache, name: str) -> Callable[[Tensor], Tensor]:
    def record(x: Tensor) -> Tensor:
        cache[name] = x.detach()
        return x

    return record

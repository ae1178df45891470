"""Hold the state that the blocks of a patched model share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.families.base import NORM, BlockCall, Called, Family
from actvar.sparse.block_cache import Modulations
from actvar.sparse.called_layers import expect_readable, log_called
from actvar.sparse.passes import Pass, Passes
from actvar.sparse.record import BlockRecord
from actvar.sparse.sample_graphs import SampleGraphs
from actvar.sparse.schedule import Scale, build_schedule, numbered_scale, unknown_scale
from actvar.sparse.strength import StrengthWeights
from actvar.utils.wrappers import unwrapped
from actvar_kernels import Residual
from actvar_kernels.cpu_backend.packing import drop_changed


@dataclass
class PatchState:
    """Hold the configuration, family and schedules of a patched model, and the state during a call.

    Args:
        config: what is computed.
        family: the family of the model.
        schedules: scales of every block.
        execution: how the model is run.
        rows_are_guided: whether conditional rows come first, then as many unconditional ones.
        keeps_kv_buffer: whether the K/V cache may lie in memory that the last sample left.
        writes_in_place: whether a block may write its result into its input.
        defers_residuals: whether nothing but the next block sees what a block returns.
        deferred: the residual that the last block left to the next one, or None.
        modulations: AdaLN of all blocks during a sample, otherwise None.
        seed: the fast sampler's seeds while it samples, `[1]` or with one per image `[B]` int64, otherwise None.
        graphs: CUDA graphs of whole samples.
        records: the list that blocks append their records to, or None.
        passes: the passes whose tensors are alive.
        maps: height and width of the token maps that the schedules are for.
        traced: the pass that a compiler is tracing as a whole, if any.
        called: by block, the parts that kernels do not read.
        head_called: why kernels do not read the head, or None.
        called_is_new: whether `called` or `head_called` has changed and is not logged yet.
        quantized: by block, the dtype in which it multiplies in eight bits, or None.
        schedule: the first block's, with a scale selected, routed or static where it is so in any block.
        first_tuned: number of the first scale with the adapter's weights; 0 where these hold at every scale.
        scale_is_tuned: whether the last call of a block was at a scale with the adapter's weights.
        rows_stand_alone: whether no row is the unconditional one of another, so that all rows are computed at a scale
            without guidance.
        strengths: the weights for strengths of guidance below the adapter's.
        by_shape: by block, the scale of each pair of a token count and a count of cached rows.
    """

    config: ActVARConfig
    family: Family
    schedules: tuple[tuple[Scale, ...], ...]
    execution: Execution = field(default_factory=Execution)
    rows_are_guided: bool = False
    keeps_kv_buffer: bool = False
    writes_in_place: bool = False
    defers_residuals: bool = False
    deferred: Residual | None = None
    modulations: Modulations | None = None
    seed: Tensor | None = None
    graphs: SampleGraphs = field(default_factory=SampleGraphs)
    records: list[BlockRecord] | None = None
    passes: Passes = field(default_factory=Passes)
    traced: Pass | None = None
    maps: tuple[tuple[int, int], ...] = field(init=False)
    called: list[dict[str, Called]] = field(init=False)
    head_called: str | None = None
    called_is_new: bool = False
    scale_is_tuned: bool = True
    rows_stand_alone: bool = False
    strengths: StrengthWeights = field(init=False)
    first_tuned: int = field(init=False)
    quantized: tuple[torch.dtype | None, ...] = field(init=False)
    schedule: tuple[Scale, ...] = field(init=False)
    by_shape: tuple[dict[tuple[int, int], Scale], ...] = field(init=False)

    def __post_init__(self):
        self.called, self.strengths = [{} for _ in self.schedules], StrengthWeights(self)
        self.quantized = self.execution.formats(len(self.schedules))
        self._use_schedules()

    def _use_schedules(self) -> None:
        """Derive what depends on the schedules of the blocks alone."""
        self.schedule = tuple(
            replace(
                scales[0],
                select=any(s.select for s in scales),
                route=any(s.route for s in scales),
                static=any(s.static for s in scales),
            )
            for scales in zip(*self.schedules, strict=True)
        )
        self.first_tuned = next(scale.index for scale in self.schedule if scale.tuned)
        self.by_shape = tuple({(s.tokens, s.cached_before): s for s in schedule} for schedule in self.schedules)
        self.maps = tuple((scale.height, scale.width) for scale in self.schedules[0])

    def blocks(self, model: Any) -> list[Any]:
        """Return the blocks of `model` without wrappers."""
        return [unwrapped(block) for block in self.family.blocks(model)]

    @contextmanager
    def during(self, **flags: Any) -> Iterator[None]:
        """Set flags such as `rows_are_guided`, or `seed`, while the context is open."""
        state, previous = vars(self), {name: getattr(self, name) for name in flags}
        try:
            state.update(flags)
            yield
        finally:
            state.update(previous)

    def fit_maps(self, model: Any, maps: tuple[tuple[int, int], ...]) -> None:
        """Plan the scales of a sample or pass that brings token maps of its own.

        Args:
            model: the patched model.
            maps: height and width of the token map of every scale.

        Raises:
            ValueError: the configuration names a scale that is not there.
        """
        if maps == self.maps:
            return
        schedules = tuple(build_schedule(self.config, maps, block) for block in range(len(self.schedules)))
        self.maps, self.schedules = (), schedules  # after Ctrl-C from here on, the next sample plans again
        for block, schedule in zip(self.blocks(model), schedules, strict=True):
            block.actvar.schedule = schedule
        self._use_schedules()

    @contextmanager
    def sampling(self, model: Any, in_place: bool, guided: bool = True) -> Iterator[None]:
        """Sample while the context is open; the K/V caches are empty afterwards.

        Args:
            model: the patched model.
            in_place: whether the loop never reads a block's input again, so that a block may write into it.
            guided: whether conditional rows come first, then as many unconditional ones; otherwise all stand alone.
        """
        blocks, own = self.family.blocks(model), self.blocks(model)
        # a hook, or a forward of the block's own, may need a block's input after the block has run
        watched = any(block._forward_hooks or block._forward_pre_hooks for block in (*blocks, *own))
        in_place = in_place and not watched and not any("forward" in vars(block) for block in own)
        alone = all(block is unwrapped(block) for block in blocks)
        flags = dict(keeps_kv_buffer=True, writes_in_place=in_place)
        flags |= dict(rows_are_guided=guided, rows_stand_alone=not guided, modulations=Modulations(self.family, own))
        with self.during(**flags, deferred=None, defers_residuals=in_place and alone and self.family.hands_on):
            try:
                yield
            finally:
                self.scale_is_tuned = True
                for block in self.blocks(model):
                    self.family.cache(block).drop()
                    block.actvar.cache.forget()

    def begin_pass(self, model: Any) -> None:
        """Begin a teacher-forced pass through `model`. A compiler traces the pass as one graph.

        Raises:
            ValueError: the blocks are not those that were patched.
        """
        if torch.compiler.is_compiling():
            self.traced = Pass(self.rows_are_guided)
        else:
            self.expect_own_blocks(model)

    def end_pass(self) -> None:
        """End the pass that `begin_pass` began."""
        self.traced = None

    def pass_of(self, block: int, call: BlockCall) -> Pass:
        """Return the pass that a call belongs to.

        Args:
            block: number of the block.
            call: arguments of the block.

        Raises:
            RuntimeError: activation checkpointing runs the block again, and its pass is not known.
        """
        if self.traced is not None:
            return self.traced
        if not self._needs_passes:
            return Pass(self.rows_are_guided)
        return self.passes.enter(block, call.x, call.cond, self.rows_are_guided)

    def hand_on(self, current: Pass, out: Tensor) -> None:
        """Let a block's output `out` `[R, L, C]` lead the next block to the pass `current`."""
        if self.traced is None and self._needs_passes:
            self.passes.bind(current, out)

    @property
    def _needs_passes(self) -> bool:
        """Return whether blocks share anything in a pass."""
        return self.config.fixed_tokens or self.config.share_cfg_selection

    def defers(self, block: int, scale: Scale) -> bool:
        """Return whether block number `block` leaves its last residual at `scale` to the norm of the next block."""
        following = block + 1
        if not self.defers_residuals or following == len(self.schedules) or torch.compiler.is_compiling():
            return False
        # that norm has to read all rows, of as many sequences, by the kernel
        return scale.guided and not self.schedules[following][scale.index].select and NORM not in self.called[following]

    def take_deferred(self, x: Tensor) -> Residual | None:
        """Return the residual that gives the input of a block, or None if its input `x` `[R, L, C]` is whole.

        Raises:
            RuntimeError: `x` is not what the block before returned.
        """
        deferred, self.deferred = self.deferred, None
        if deferred is not None and deferred.x is not x:
            raise RuntimeError("expected the input of a block to be what the block before returned, got another tensor")
        return deferred

    def begin_block(self, index: int, block: Any) -> None:
        """Look at the layers of block number `index` when a sample or a teacher-forced pass begins.

        From here on, layers that are more than their weight are called. Packed copies of changed weights are dropped.

        Args:
            index: number of the block.
            block: the block, without wrappers.

        Raises:
            TypeError: the selector, the attention or the experts would have to read a layer that must be called.
        """
        if torch.compiler.is_compiling():  # the compiler guards the layers itself
            return
        called = self.family.parts_called(block)
        self.called_is_new |= called != self.called[index]
        self.called[index] = called
        if called:
            expect_readable(index, called, block.actvar.schedule, self.config.kv, self.quantized[index])
        drop_changed([*self.family.packed_weights(block), block.actvar.router.weight])

    def begin_head(self, model: Any, tokens: int) -> None:
        """Look at the layers of the head, which runs after the blocks, and log in one line what is called anew.

        Args:
            model: the patched model.
            tokens: number of tokens a row of the call. A sample begins with those of the first scale; a teacher-forced
                pass has those of all scales.
        """
        scales = self.schedule
        begins = tokens in (scales[0].tokens, scales[self.first_tuned].tokens, scales[-1].start + scales[-1].tokens)
        if not begins or torch.compiler.is_compiling():
            return
        head = self.family.head_called(model)
        self.called_is_new |= head != self.head_called
        self.head_called = head
        if self.called_is_new:
            self.called_is_new = False
            log_called(self.called, head)
        drop_changed(self.family.packed_head(model))

    def scale_of(self, block: int, call: BlockCall, cached: int) -> Scale:
        """Return the scale of a call.

        Args:
            block: number of the block.
            call: arguments of the block.
            cached: number of rows in the block's K/V cache.

        Raises:
            ValueError: no scale has these tokens after so many cached rows, or the scale of that number has others.
        """
        tokens = call.x.shape[1]
        if call.scale is not None:
            return numbered_scale(self.schedules[block], call.scale, int(tokens))
        scale = self.by_shape[block].get((int(tokens), int(cached)))  # a trace has tensors here
        if scale is None:
            raise unknown_scale(self.by_shape[block], tokens, cached)
        return scale

    def use_weights_of(self, scale: Scale) -> None:
        """Remember for the head which weights `scale` has.

        Raises:
            RuntimeError: a compiler traces a scale with the model's own weights beside those of an adapter.
        """
        if self.first_tuned:
            if torch.compiler.is_compiling():
                raise RuntimeError("weights_from: a patch with other weights at later scales cannot be compiled")
            self.scale_is_tuned = scale.tuned

    def leaves_out_rows(self, scale: Scale) -> bool:
        """Return whether `scale` is computed for the conditional rows alone.

        Raises:
            ValueError: it is one without guidance, and rows are not known to be guided.
        """
        if scale.guided or self.rows_stand_alone:
            return False
        if not self.rows_are_guided:
            raise ValueError(
                f"guidance_until: {self.config.guidance_until} leaves out the unconditional rows of the last scales, "
                "and whether there are such rows is not known; open actvar.guided_rows(var) around the loop"
            )
        return True

    def expect_same_weights(self) -> None:
        """Check that all scales may be computed at once.

        Raises:
            ValueError: early scales have the model's own weights, and later ones those of the adapter.
        """
        if self.first_tuned:
            raise ValueError(
                f"weights_from: the scales before number {self.first_tuned} have other weights than the rest, so the "
                "blocks cannot run all scales at once under a mask; call the model, or run scale by scale"
            )

    def expect_own_blocks(self, model: Any) -> None:
        """Check that the blocks of a patched model are those that were patched, in their order.

        Raises:
            ValueError: they are not.
        """
        blocks, count = self.family.blocks(model), len(self.schedules)
        for index, block in enumerate(blocks):
            own = getattr(block, "actvar", None)
            if own is None:
                problem = f"the patch is gone from blocks[{index}], or the block is new"
            elif own.shared is not self:
                problem = f"the patch on blocks[{index}] is that of another model"
            elif own.block_index != index:
                problem = f"blocks[{index}] is the one that was patched as blocks[{own.block_index}]"
            else:
                continue
            break
        else:
            if len(blocks) == count:
                return
            problem = f"{len(blocks)} blocks are left"
        raise ValueError(
            f"expected the {count} blocks that were patched, in their order, but {problem}; call "
            "actvar.remove_patch(var), then actvar.apply_patch(var, config) again. A shallow copy (copy.copy) shares "
            "the blocks of its model; copy.deepcopy makes others"
        )


def patch_state(model: Any) -> PatchState:
    """Return the shared state of a patched model, which may be inside a wrapper.

    Raises:
        ValueError: the model is not patched, or its blocks are not the ones that were patched.
    """
    model = unwrapped(model)
    if not is_patched(model):
        raise ValueError(f"expected a model patched by actvar.apply_patch, got an unpatched {type(model).__name__}")
    model.actvar.expect_own_blocks(model)
    return model.actvar


def is_patched(model: Any) -> bool:
    """Return whether `model`, without wrappers, is patched."""
    return isinstance(getattr(model, "__dict__", {}).get("actvar"), PatchState)

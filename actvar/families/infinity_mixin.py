"""Mix into a patched Infinity its sampling, its teacher forcing and its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actvar.families.requests import Request
from actvar.models.infinity import Infinity
from actvar.models.infinity.arguments import Draw, checked_draw
from actvar.models.infinity.layers import Text, TextCondition
from actvar.models.infinity.schedules import Schedule, checked_schedule, tokens_of
from actvar.models.infinity.transformer import MOST_SCALES
from actvar.models.token_draw import fast_draw, seed_tensor
from actvar.utils.devices import is_on_gpu
from actvar.utils.weight_override import own_weights
from actvar_kernels import sample_tokens

if TYPE_CHECKING:
    from actvar.families.patched_state import PatchedState

    _Base = Infinity
else:
    _Base = nn.Module


TEXT_STEP = 64
"""Lengths of filled-up texts are multiples of it, so that there are at most eight of them."""


def maps_of(schedule: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int], ...]:
    """Return height and width of the maps of a schedule of `(1, h, w)`."""
    return tuple((int(h), int(w)) for _, h, w in schedule)


def unfiltered(schedule: Schedule, depth: int, cfg: float) -> Draw:
    """Return the draw of logits as they are, with guidance on them where `cfg` is not 1."""
    return checked_draw(len(schedule), depth, cfg, 1.0, 0, 0.0, None, (0,))


class PatchedInfinity(_Base):
    """Change how a patched Infinity samples; goes in front of its class, with the patch's state in `self.actvar`."""

    actvar: PatchedState

    def forward(self, text, lengths, inputs, schedule):
        """Run teacher forcing as the model itself does, with the arguments and errors of `Infinity.forward`.

        Raises:
            ValueError: the blocks are not those that were patched, or the configuration names a scale that the schedule
                does not have.
        """
        self.actvar.begin_pass(self)
        try:
            schedule = checked_schedule(schedule, MOST_SCALES)
            self.actvar.fit_maps(self, maps_of(schedule))
            return super().forward(text, lengths, inputs, schedule)
        finally:
            self.actvar.end_pass()

    def logits_of_inputs(self, condition: TextCondition, inputs: Tensor, schedule: Schedule) -> Tensor:
        """Return logits of all scales at once, or one after the other where early ones have other weights."""
        if not self.actvar.first_tuned:
            return super().logits_of_inputs(condition, inputs, schedule)
        draw = unfiltered(schedule, self.depth, 1.0)
        of_scale = [None, *inputs.split(tokens_of(schedule)[1:], dim=1)]
        logits = []
        with Infinity.sampling(self, schedule, draw), self.actvar.during(rows_stand_alone=True):
            for scale, scale_inputs in enumerate(of_scale):
                x = self.embedded(scale, scale_inputs, condition)
                x = self.run_blocks(schedule, scale, x, condition, draw)
                logits.append(self.get_logits(x, condition.pooled))
        return torch.cat(logits, dim=1)

    def drawn(self, condition: TextCondition, schedule: Schedule, draw: Draw) -> tuple[Tensor, ...]:
        """Return images and bits as `Infinity.drawn` does. By the fast sampler a GPU may replay a CUDA graph of it.

        The condition is an input of the graph, and computed before. On a GPU the fast sampler fills up its texts to a
        multiple of `TEXT_STEP` tokens, so that texts of other lengths have the same graph.

        Raises:
            ValueError: as in `sampling`, or the Execution asks for a graph that is not possible.
        """
        state = self.actvar
        state.expect_own_blocks(self)
        state.fit_maps(self, maps_of(schedule))
        with state.strengths.running(self, *draw.cfg):
            if state.execution.sampler == "fast":
                request = self.request(condition, schedule, draw)
                return state.graphs.results(self, request, self.drawn_request, state.execution.cuda_graph)
            state.graphs.refuse(self, state.execution.cuda_graph, "the sampler of PyTorch waits for its generator")
            return super().drawn(condition, schedule, draw)

    def request(self, condition: TextCondition, schedule: Schedule, draw: Draw) -> Request:
        """Return what a sample by the fast sampler depends on; arguments and errors are those of `drawn`."""
        images = len(condition.pooled) // (2 if draw.is_guided else 1)
        seeds, text = seed_tensor(draw.g_seed, images, condition.pooled.device), condition.text
        if is_on_gpu(self):
            text = text.filled_up(-(-max(text.lengths) // TEXT_STEP) * TEXT_STEP)
        inputs = seeds, condition.pooled, condition.modulation, text.tokens
        settings = tuple(schedule), draw._replace(g_seed=None), tuple(text.lengths)
        return Request(inputs + (() if text.filled is None else (text.filled,)), settings, (self.angles(schedule),))

    def drawn_request(self, request: Request) -> tuple[Tensor, ...]:
        """Return images and bits of a request, drawn kernel by kernel or recorded by the capture of a graph."""
        (seeds, pooled, modulation, tokens, *filled), (schedule, draw, lengths) = request.inputs, request.settings
        condition = TextCondition(pooled, modulation, Text(tokens, lengths, *filled))
        with self.actvar.during(seed=seeds):
            return super().drawn(condition, list(schedule), draw)

    @contextmanager
    def sampling(self, schedule: Schedule, draw: Draw) -> Iterator[None]:
        """Sample with the patch while the context is open; the K/V caches are empty afterwards.

        Raises:
            ValueError: the blocks are not those that were patched, or the configuration names a scale that the schedule
                does not have.
        """
        state = self.actvar
        state.expect_own_blocks(self)
        state.fit_maps(self, maps_of(schedule))
        with super().sampling(schedule, draw), state.sampling(self, True, draw.is_guided):
            yield

    def scales(self, schedule):
        """Yield the numbers of the scales that are sampled; teacher forcing runs all of them."""
        for scale in super().scales(schedule):
            if self.actvar.schedule[scale].left_out:
                return
            yield scale

    def run_blocks(self, schedule, scale, x, condition, draw):
        """Return the last block's output as `Infinity.run_blocks` does, without guidance where there is none.

        It is `[R, L, C]`, or `[R / 2, L, C]` where the unconditional rows were left out.
        """
        return super().run_blocks(schedule, scale, x, condition, draw if self._is_guided(scale) else draw.off())

    def guided_logits(self, scale, x, condition, draw):
        """Return the logits to draw from as `Infinity.guided_logits` does, of the conditional rows without guidance."""
        if self._is_guided(scale):
            return super().guided_logits(scale, x, condition, draw)
        return self.get_logits(x, condition.pooled[: len(x)]).mul(1 / draw.tau[scale])

    def draw_bits(self, scale, logits, draw, rng):
        """Return bits `[B, N]` int64 of logits `[B, N, 2]` as `Infinity.draw_bits`, by the sampler of the Execution."""
        if self.actvar.seed is not None:
            return sample_tokens(logits, None, draw.top_k, draw.top_p, seed=self.actvar.seed, step=scale)
        if self.actvar.execution.sampler == "fast":
            return fast_draw(logits, None, draw.top_k, draw.top_p, rng, scale)
        return super().draw_bits(scale, logits, draw, rng)

    def decode(self, features):
        """Decode features `[B, bits, h, w]` as `Infinity.decode` does, in the precision of the Execution."""
        dtype = self.actvar.execution.decoder_dtype
        with torch.autocast(features.device.type, getattr(torch, dtype)) if dtype else nullcontext():
            images = super().decode(features)
        return images.float() if dtype else images

    def get_logits(self, x, pooled):
        """Return the logits of `x` `[R, L, C]` as the model's own method does, by the weights of the scale."""
        with nullcontext() if self.actvar.scale_is_tuned else own_weights(self.head):
            self.actvar.begin_head(self, x.shape[1])
            return super().get_logits(x, pooled)

    def _is_guided(self, scale: int) -> bool:
        return self.actvar.rows_stand_alone or self.actvar.schedule[scale].guided

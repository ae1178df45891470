"""Mix into a patched VAR its sampling, its head, the draw of its tokens and the decoding of its images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actvar.families.layers import linear_called, module_called
from actvar.families.requests import Request
from actvar.families.var_layers import ada_lin_called
from actvar.families.var_scales import logits_by_scale
from actvar.models.arguments import checked_draw, checked_integer, checked_labels, one_thread
from actvar.models.token_draw import fast_draw, generators, sample_guided, seed_tensor
from actvar.models.transformer_block import HeadNorm
from actvar.models.var import VAR
from actvar.utils.class_swap import own_class
from actvar.utils.plain_layers import why_called
from actvar.utils.weight_override import own_weights
from actvar_kernels import choose_fused, linear, normalize_modulate, sample_tokens

if TYPE_CHECKING:
    from actvar.families.patched_state import PatchedState

    _Base = VAR  # the class behind the mixin; the public code's has these attributes and methods too
else:
    _Base = nn.Module


class PatchedVAR(_Base):
    """Change how a patched VAR samples; goes in front of the model's class, with the patch's state in `self.actvar`."""

    actvar: PatchedState

    def forward(self, label_B, x_BLCv_wo_first_l, *args, **kwargs):
        """Run teacher forcing as the model itself does: `[B]` and `[B, L - first_l, Cvae]` -> logits `[B, L, V]`.

        Raises:
            ValueError: the blocks are not those that were patched.
        """
        self.actvar.begin_pass(self)
        try:
            if self.actvar.first_tuned:
                return self._logits_by_scale(label_B, x_BLCv_wo_first_l)
            return super().forward(label_B, x_BLCv_wo_first_l, *args, **kwargs)
        finally:
            self.actvar.end_pass()

    def _logits_by_scale(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Return the logits of `forward` scale by scale, since early scales have other weights than later ones."""
        if self.training:
            dropped = torch.rand(len(labels), dtype=torch.float32, device=labels.device) < self.cond_drop_rate
            labels = torch.where(dropped, self.num_classes, labels)
        with self.actvar.during(rows_stand_alone=True):
            return torch.cat([logits for _, logits in logits_by_scale(self, labels, inputs)], dim=1)

    def autoregressive_infer_cfg(self, B, label_B, *args, **kwargs):
        """Sample as the model itself does, with the arguments and errors of `VAR.autoregressive_infer_cfg`.

        The K/V caches are empty afterwards, also after an exception. By the fast sampler a GPU may replay a CUDA graph
        of the whole sample, see `actvar.Execution`.

        Raises:
            ValueError: the blocks are not those that were patched, or the Execution asks for a graph that is not
                possible.
        """
        state = self.actvar
        state.expect_own_blocks(self)
        loop_is_ours = own_class(self).autoregressive_infer_cfg is VAR.autoregressive_infer_cfg
        if not loop_is_ours:
            label_B = checked_labels(B, label_B, self.num_classes, self.lvl_1L.device)
        wanted = state.execution.cuda_graph
        with one_thread(self), state.strengths.running(self, _strength(*args, **kwargs)):
            request = None
            if loop_is_ours and state.execution.sampler == "fast":
                request = self.request(B, label_B, *args, **kwargs)
            if request is not None:
                return state.graphs.results(self, request, self.drawn, wanted)[0]
            state.graphs.refuse(self, wanted, "more_smooth draws from PyTorch's generator")
            with state.sampling(self, in_place=loop_is_ours):
                return super().autoregressive_infer_cfg(B, label_B, *args, **kwargs)

    def request(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False) -> Request | None:
        """Return what a sample by the fast sampler depends on, or None where its noise is PyTorch's.

        Arguments and errors are those of `VAR.autoregressive_infer_cfg`.
        """
        if more_smooth:
            return None
        device = self.lvl_1L.device
        g_seed, cfg, top_k, top_p = checked_draw(g_seed, cfg, top_k, top_p, self.V)
        B = checked_integer("B", B, 1)
        checked: Any = checked_labels(B, label_B, self.num_classes, device)
        if checked is None:
            labels = self._labels(B, None, generators(g_seed, B, device))
        elif isinstance(checked, int):
            labels = torch.full((B,), checked, device=device)
        else:
            labels = label_B.long()
        return Request((seed_tensor(g_seed, B, device), labels), (cfg, top_k, top_p))

    def drawn(self, request: Request) -> tuple[Tensor]:
        """Return the images of a request, drawn kernel by kernel or recorded by the capture of a graph."""
        seeds, labels = request.inputs
        with self.actvar.during(seed=seeds), self.actvar.sampling(self, in_place=True):
            return (super().autoregressive_infer_cfg(len(labels), labels, None, *request.settings),)

    def scales(self):
        """Return the numbers of the scales that are sampled; teacher forcing of the whole model runs all of them."""
        left_out = 0 if self.actvar.rows_stand_alone else sum(scale.left_out for scale in self.actvar.schedule)
        numbers = super().scales()
        return numbers[: len(numbers) - left_out]

    def decode(self, f_hat):
        """Decode features `[B, Cvae, side, side]` as `VAR.decode` does, as the Execution says."""
        dtype = self.actvar.execution.decoder_dtype
        with (
            _cudnn_benchmark() if self.actvar.execution.cudnn_benchmark else nullcontext(),
            torch.autocast(f_hat.device.type, getattr(torch, dtype)) if dtype else nullcontext(),
        ):
            images = super().decode(f_hat)
        return images.float() if dtype else images

    def get_logits(self, x, cond_BD):
        """Return the logits of `x` `[R, L, C]` as the model's own method does, computed by kernels where these run.

        Conditional rows alone, `[R / 2, L, C]`, have their logits twice, so that guidance leaves them as they are.
        """
        if 2 * len(x) == len(cond_BD):
            return self.get_logits(x, cond_BD[: len(x)]).repeat(2, 1, 1)
        with nullcontext() if self.actvar.scale_is_tuned else own_weights(self.head):
            self.actvar.begin_head(self, x.shape[1])
            logits = self.kernel_logits(x, cond_BD)
            if logits is None:
                return super().get_logits(x, cond_BD)
        ours = self.actvar.rows_are_guided and isinstance(self, VAR)
        return logits if ours else logits.float()

    def kernel_logits(self, x: Tensor, cond: Tensor, guidance: float | None = None) -> Tensor | None:
        """Return logits by kernels in the head's dtype, or None where the model has to compute them itself.

        The head is linear, so guidance may act on its input. Triton alone applies guidance, in the launch of the norm.
        That launch runs where neither autocast nor the head's dtype changes the dtype of the norm.

        Args:
            x: output of the last block, `[R, L, C]`.
            cond: embedded classes `[R, C]`.
            guidance: strength, or None to return logits of all rows.

        Returns:
            logits `[R / 2, L, V]` after guidance, or `[R, L, V]` without it.
        """
        if linear_called(self.head) is not None:
            return None
        backend = choose_fused(x)
        if backend.packs_weights and guidance is None:
            h = self.head_nm(x.float(), cond)
            h = h if torch.is_autocast_enabled("cpu") else h.to(self.head.weight.dtype)
            return linear(h, self.head.weight, self.head.bias)
        if not backend.fuses_residual or x.dtype != self.head.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        norm = self.head_nm
        if module_called(norm, HeadNorm, {"ada_lin", "ln_wo_grad"}) or why_called(norm.ln_wo_grad, nn.LayerNorm):
            return None
        together = self.actvar.modulations
        if together is None or ada_lin_called(norm.ada_lin) is not None:
            modulation = norm.ada_lin(cond)
        else:
            modulation = together.of_head(cond, lambda: norm.ada_lin(cond))
        scale, shift = modulation.unsqueeze(1).chunk(2, dim=-1)
        return self.head(normalize_modulate(x, scale, shift, guidance))

    def next_tokens(self, scale, inputs, condition, guidance, top_k, top_p, rng):
        """Return tokens `[B, L]` int64 as `VAR.next_tokens` does, with guidance before the head where kernels can."""
        is_guided = self.actvar.schedule[scale].guided
        if is_guided and self.actvar.execution.sampler == "torch":
            return super().next_tokens(scale, inputs, condition, guidance, top_k, top_p, rng)
        x = self.run_blocks(scale, inputs, condition)
        if not is_guided:
            logits = self.get_logits(x, condition.embedded[: len(x)])
            return self.draw(logits, None, top_k, top_p, rng, scale)
        with nullcontext() if self.actvar.scale_is_tuned else own_weights(self.head):
            logits = self.kernel_logits(x, condition.embedded, guidance)
        if logits is None:
            return self.draw(self.get_logits(x, condition.embedded), guidance, top_k, top_p, rng, scale)
        return self.draw(logits, None, top_k, top_p, rng, scale)

    def draw(self, logits: Tensor, guidance: Any, top_k, top_p, rng, scale):
        """Draw tokens `[B, L]` int64 as `VAR.draw` does, by the sampler of the Execution.

        Guidance is None for logits `[B, L, V]` that have it already.
        """
        if self.actvar.execution.sampler == "torch":
            if getattr(own_class(self), "draw", None) is VAR.draw:
                return sample_guided(logits, guidance, top_k, top_p, rng)
            if guidance is None:
                logits, guidance = logits.repeat(2, 1, 1), 0.0
            return super().draw(logits, guidance, top_k, top_p, rng, scale)

        seeds = self.actvar.seed
        if rng is not None or seeds is None:
            return fast_draw(logits, guidance, top_k, top_p, rng, scale)
        return sample_tokens(logits, guidance, top_k, top_p, seed=seeds, step=scale)


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN time its algorithms while the context is open."""
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _strength(g_seed: Any = None, cfg: Any = 1.5, *_others: Any, **_named: Any) -> Any:
    """Return the strength among the arguments of `VAR.autoregressive_infer_cfg` behind the labels."""
    return cfg

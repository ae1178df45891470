"""The choices that make up a training: the paper's, and those that win here."""

from __future__ import annotations

from dataclasses import dataclass, replace

LR_PER_256 = 1e-4
MUON_LR = 2e-3
LORA_LR = 1e-2
"""Peak learning rate of low-rank factors by AdamW, which bring the bundled model as near to dense as Muon's best."""


@dataclass(frozen=True)
class Recipe:
    """The choices for both stages.

    Args:
        calibrated: instead of training selectors and routers, stage 1 fits them in closed form, with experts of
            clustered hidden units (`actvar.calibrate`).
        uniform: a calibrated stage 1 leaves the rates unchanged, instead of choosing those per block and scale that
            lose the least at the same FLOPs.
        losses: parts of stage 2's loss among `cls`, `block` and `output` (Eq. 22), and `guided`
            (`actvar.distill.losses.guided_loss`).
        muon: stage 2 trains the matrices of the blocks with Muon, see `actvar.training.plan.Plan`; low-rank factors are
            trained with AdamW.
    """

    calibrated: bool = False
    uniform: bool = False
    losses: tuple[str, ...] = ("cls", "block", "output")
    muon: bool = False

    def lr(self, stage: int, batch: int, lora: bool = False) -> float:
        """Return the peak learning rate: for AdamW on whole weights that of VAR, in proportion to the batch.

        Args:
            stage: 1 or 2.
            batch: token maps per step.
            lora: whether stage 2 trains low-rank factors.
        """
        if lora:
            return LORA_LR
        return MUON_LR if self.muon and stage == 2 else LR_PER_256 * batch / 256


_BEST = Recipe(calibrated=True, losses=("output",), muon=True)
RECIPES = {"paper": Recipe(), "best": _BEST, "guided": replace(_BEST, losses=("output", "guided"))}
"""`guided` is for a stage 2 that goes on from the adapter of `best`, for samples drawn with guidance."""
CONDITIONAL = replace(RECIPES["guided"], losses=("guided",))
"""`guided` where conditional rows alone imitate guided logits (`ActVARConfig.guidance_until`)."""

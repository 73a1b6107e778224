"""What a server computes: first a shipped text, then the whole model, then the conclusion from both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from kt_launch.proving import text
from kt_launch.proving.text import Prediction
from kt_launch.proving.whole_model import Findings, Float32Run
from kt_model.contract import BASE
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan


@dataclass(frozen=True)
class Content:
    """By side: `base`, or an adapter's name."""

    texts: dict[str, Prediction]
    whole: Findings

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        texts = {side: found.as_dict() for side, found in self.texts.items()}
        return {"whole_model": self.whole.as_dict(), "text": texts}

    def lines(self) -> list[str]:
        """Sentences for the terminal; a warning for a side that predicts nothing and was not compared with transformers
        either."""
        doubted = [side for side, found in self.texts.items() if not (found.sane or side in self.whole.sides)]
        texts = [f"{'warning: ' if side in doubted else ''}{found.line(side)}" for side, found in self.texts.items()]
        return [*self.whole.lines(), *texts]


def prove_content(plan: LaunchPlan, client: httpx.Client, float32: Float32Run, replicas: int = 1) -> Content:
    """Raises ProofFailed, and httpx.HTTPError if the server does not answer."""
    texts = text.predict_all(client, plan, (BASE, *plan.adapters))
    whole = float32.check(client, replicas)
    _judge(plan, texts[BASE], whole)
    return Content(texts, whole)


def _judge(plan: LaunchPlan, base: Prediction, whole: Findings) -> None:
    """The base must predict the text, unless it was compared with transformers; an adapter may be trained on other
    text."""
    wanted = plan.config.get("proof", {}).get("text") == "demand"
    if base.sane or BASE in whole.sides or not wanted:
        return
    raise ProofFailed(
        "proof",
        f"the base predicts a shipped text no better than by chance: its tokens are {base.gain:.2f} nats likelier at "
        f"their own positions than at others, expected above {base.least:.2f}, and the whole model was not compared "
        f"with transformers: {whole.unchecked[BASE]}",
        f"Weights are wrong, or it has not learnt English: {text.KEY}=warn serves it",
    )

"""The judge as a reward term."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import ConfigError, OmniAlphaError
from rewards.base import RewardBatch, register
from rewards.judge import likeness
from rewards.judge.asking import Asker
from rewards.judge.client import JudgeClient
from rewards.judge.protocols import Score, Verdict, grid, pointwise, versus
from rewards.judge.served import TEMPLATES
from rewards.judge.shipped import named_judge
from rewards.judge.templates import Templates, load_templates

if TYPE_CHECKING:
    from rewards.judge.model import ModelJudge


class JudgeScorer:
    """Scores groups by asking: whoever answers, a server or a model in this process."""

    needs = frozenset({"prompt"})

    def __init__(
        self,
        asker: Asker,
        templates: Templates,
        protocol: Literal["pointwise", "grid"] = "pointwise",
        seed: int = 0,
        orders: int = 1,
    ) -> None:
        """
        Args:
            asker: whoever answers; that its labels are single tokens was checked.
            templates: what is asked.
            protocol: ``pointwise`` rates members one by one, ``grid`` shows the whole group. A group of one, as the
                evaluation and the gaming watch have them, is rated pointwise either way.
            seed: of the grid's orders.
            orders: shuffled orders in which a grid is asked.

        Raises:
            ConfigError: no such protocol, orders that it does not have, or nothing to look for a likeness with.
        """
        if protocol not in ("pointwise", "grid"):
            raise ConfigError(f"judge: protocol {protocol!r} is no reward; choose pointwise or grid")
        if orders < 1 or (orders > 1 and protocol != "grid"):
            raise ConfigError(f"judge: orders {orders} with protocol {protocol}; a grid has 1 or more, pointwise has 1")
        if templates.tells_likeness("pointwise") or templates.tells_likeness(protocol):
            likeness.prepare()
        self._asker, self._templates = asker, templates
        self._protocol, self._seed, self._orders = protocol, seed, orders
        self.largest_group = len(templates.protocol("grid").labels) if protocol == "grid" else None

    def score(self, batch: RewardBatch) -> list[Score]:
        """Scores (G,): pointwise in [0, 1], of a grid log-probabilities. A missing one is its reason."""
        if self._protocol == "pointwise" or batch.members == 1:
            return pointwise(self._asker, self._templates, batch)
        return grid(self._asker, self._templates, batch, self._seed, self._orders)

    def compare(self, first: Sequence[RewardBatch], second: Sequence[RewardBatch]) -> list[Verdict | OmniAlphaError]:
        """Samples of two policies for the same records, two and two in both orders; raises as :func:`versus`."""
        return versus(self._asker, self._templates, first, second)


@register("judge")
class Judge(JudgeScorer):
    """What a vision language model says of the layers, by prompt templates; for tasks without one truth."""

    def __init__(
        self,
        folder: str | Path | None = None,
        templates: str = TEMPLATES,
        protocol: Literal["pointwise", "grid"] = "pointwise",
        seed: int = 0,
        orders: int = 1,
        asker: JudgeClient | None = None,
    ) -> None:
        """
        Args:
            folder: a judge's model folder or the name of a shipped one, asked in the scorer's own process; None asks
                the run's judge.
            templates: ``small`` for a judge made by ``omnialpha judge train``, ``vlm`` for others, or a folder.
            protocol, seed, orders: as in :class:`JudgeScorer`.
            asker: the run's judge (``judging``), which the run puts in after it has checked the labels.

        Raises:
            ConfigError: a folder or template that cannot be used, a label that is not one token, or nobody to ask.
        """
        asked = load_templates(templates)
        judge = asker if folder is None else _judge_of(named_judge(folder), asked)
        if judge is None:
            raise ConfigError(
                "judge: nobody to ask; give params.folder, a model's folder, or say in the run's judging who serves one"
            )
        super().__init__(judge, asked, protocol, seed, orders)
        how = "grid (single samples pointwise)" if protocol == "grid" else protocol
        self.describes = f"{judge.name}, {how}, templates {asked.folder.name}"


def _judge_of(folder: Path, asked: Templates) -> "ModelJudge":
    from rewards.judge.model import ModelJudge  # slow to import, and rarely needed

    judge = ModelJudge(folder)
    asked.check_labels(judge.reader.tokens)
    return judge

"""The reward terms that ask the run's judge (``judging`` in its configuration) instead of a model of their own."""

from rewards.combine import RewardConfig, TermConfig, active_terms
from rewards.judge.client import JudgeClient
from rewards.judge.templates import load_templates

TEMPLATES = "vlm"
"""What a term asks by where its params do not say."""


def is_served(term: TermConfig) -> bool:
    """Whether a term asks the run's judge."""
    return term.source == "judge" and "folder" not in term.params


def served_terms(config: RewardConfig) -> list[TermConfig]:
    """The terms that ask the run's judge."""
    return [term for term in config.terms if is_served(term)]


def judging_term(config: RewardConfig, task: str) -> TermConfig | None:
    """The first term by which the run's judge looks at a task, of whatever weight."""
    return next((term for k in active_terms(config, task) if is_served(term := config.terms[k])), None)


def check_templates(config: RewardConfig, asker: JudgeClient) -> None:
    """Refuses labels that are not one token of the served model.

    Raises:
        ConfigError: names the file, the protocol and the label.
        RewardError: the judge does not answer.
    """
    for term in served_terms(config):
        load_templates(term.params.get("templates", TEMPLATES)).check_labels(asker.tokens)


def with_judge(config: RewardConfig, asker: JudgeClient) -> RewardConfig:
    """The terms as processes are to build them: those that ask the run's judge hold the client."""
    terms = [
        term.model_copy(update={"params": {**term.params, "asker": asker}}) if is_served(term) else term
        for term in config.terms
    ]
    return config.model_copy(update={"terms": tuple(terms)})

"""What is asked of a run: four expectations and five questions, one record each. Plain records, without pandas.

Statistics, sentences, tables and the plan take their names, families and words from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["QUALITY_LEVEL", "QUESTIONS", "Kind", "Question"]

Kind = Literal["expectation", "question", "pruning"]

QUALITY_LEVEL = 40.0
"""Expectations about quality are about levels from here on (per cent of the heads)."""


@dataclass(frozen=True)
class Question:
    """One expectation or question, and how a difference between two variants is put into words.

    ``asked`` says it in a sentence for readers. ``kind`` "pruning" is about pruning itself, a variant against the unpruned
    model, and not about agency against the baseline. ``claim`` has the places ``variant``, ``reference``, ``of_reference``
    (the possessive) and ``size``; it is empty where the answer is no difference between two variants. ``more`` and ``less``
    are the directions of that size, and ``place`` says at which levels the claim holds.
    """

    id: str
    kind: Kind
    title: str
    asked: str
    claim: str = ""
    more: str = "higher"
    less: str = "lower"
    place: str = ""


_AT_HIGH_LEVELS = f"with {QUALITY_LEVEL:g} % of the heads or more pruned"

QUESTIONS: Mapping[str, Question] = {
    "E1": Question(
        "E1",
        "expectation",
        "Speed",
        "Expected: agency keeps or gains speed as heads are pruned, and is faster than the baseline.",
        claim="{variant} generates text {size} than {reference}",
        more="faster",
        less="slower",
        place="with heads pruned",
    ),
    "E1p": Question(
        "E1p",
        "expectation",
        "Speed at equal perplexity",
        "The same, where both are pruned until their text is equally good.",
        claim="at equal perplexity {variant} generates text {size} than {reference}",
        more="faster",
        less="slower",
    ),
    "E2": Question(
        "E2",
        "expectation",
        "Quality",
        "Expected: agency keeps lower perplexity at high levels of pruning.",
        claim="{variant}'s perplexity is {size} than {of_reference}",
        place=_AT_HIGH_LEVELS,
    ),
    "E3": Question(
        "E3",
        "expectation",
        "Diversity",
        "Expected: agency's text stays nearer to the unpruned model's diversity at high levels of pruning.",
        claim=(
            "the distance of {variant}'s diversity (distinct-2) from the unpruned model's is {size} than {of_reference}"
        ),
        more="larger",
        less="smaller",
        place=_AT_HIGH_LEVELS,
    ),
    "E4": Question(
        "E4",
        "expectation",
        "Responsiveness",
        "Expected: agency's first token comes sooner.",
        claim="{variant}'s wait for the first token is {size} than {of_reference}",
        more="longer",
        less="shorter",
        place="with heads pruned",
    ),
    "Q1": Question(
        "Q1",
        "question",
        "Resilience",
        "Does agency improve resilience to pruning?",
        claim="every further 10 % makes {variant}'s perplexity {size} relative to {of_reference}",
    ),
    "Q2": Question("Q2", "question", "Optimal level", "How many heads can go before quality suffers?"),
    "Q3": Question(
        "Q3",
        "question",
        "Temperature",
        "How does temperature affect pruned models: does it change how the two compare?",
    ),
    "Q4": Question("Q4", "question", "Tight resources", "Is agency more beneficial the more is pruned?"),
    "Q5": Question("Q5", "question", "Which metrics", "Which measurements benefit most from agency?"),
    "P1": Question(
        "P1",
        "pruning",
        "Speed of pruned models",
        "Does pruning make the model faster?",
        claim="{variant} generates text {size} than {reference}",
        more="faster",
        less="slower",
        place="with heads pruned",
    ),
    "P2": Question(
        "P2",
        "pruning",
        "Accuracy lost",
        "Does pruning lose accuracy on tasks, by more than the margin?",
        claim="{variant}'s accuracy is {size} than {of_reference}",
    ),
}
"""Every expectation and question by its id, in the order in which they are answered."""

"""Does an app answer with the policy it is said to serve?

N observations, A actions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

PROPENSITY_TOLERANCE = 1e-4  # float32 in another order of sums differs by 1e-6; another policy by 1e-2 and more


class WrongAnswers(Exception):
    """An app does not serve the policy that its numbers would be published under."""


class Answer(NamedTuple):
    """An action, and its probability where the app says it; such an app samples, the others are greedy."""

    action: int
    propensity: float | None = None


def require_same_answers(app: str, answers: Sequence[Answer], distributions_NA: np.ndarray) -> None:
    """Raise `WrongAnswers` unless every answer is what the policy's distribution says.

    A greedy app must give the most likely action, one that samples the probability of the action that it drew.
    """
    if len(answers) != len(distributions_NA):
        raise WrongAnswers(f"{app} gave {len(answers)} answers to {len(distributions_NA)} observations")
    wrong = [index for index, (answer, row_A) in enumerate(zip(answers, distributions_NA)) if not _is_right(answer, row_A)]
    if wrong:
        first = wrong[0]
        raise WrongAnswers(
            f"{app} answers {len(wrong)} of {len(answers)} observations unlike the policy, first number {first} with "
            f"{answers[first]} where the policy has {np.round(distributions_NA[first], 4).tolist()}; its speed says nothing"
        )


def _is_right(answer: Answer, distribution_A: np.ndarray) -> bool:
    if type(answer.action) is not int or not 0 <= answer.action < len(distribution_A):
        return False
    if answer.propensity is None:
        return answer.action == int(distribution_A.argmax())
    return abs(answer.propensity - float(distribution_A[answer.action])) <= PROPENSITY_TOLERANCE


def ask_each(post: Callable[[Any], Any], bodies: Sequence[Any], read: Callable[[Any], Answer]) -> list[Answer]:
    """Return the app's answers, one request each; raises `WrongAnswers` for what has another form."""
    try:
        return [read(post(body)) for body in bodies]
    except (KeyError, TypeError, IndexError) as error:
        raise WrongAnswers(f"an answer has not the expected form: {error!r}") from error

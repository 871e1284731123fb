"""Baselines that answer multiple-choice questions by counting the words of a text, without learning."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from math import log
from typing import Any


def word_frequency_baseline(questions: Iterable[Mapping[str, Any]], documents: Iterable[str]) -> float:
    """Accuracy, 0 to 1, of always choosing the answer whose words are most frequent in `documents`.

    A choice's score is the mean of log(count + 1) over its words. Tied choices share the point equally.
    """
    counts = Counter(word for document in documents for word in words_of(document))

    def score(context: str, choice: str) -> float:
        found = words_of(choice)
        return sum(log(counts[word] + 1) for word in found) / max(len(found), 1)

    return _accuracy(questions, score)


def word_pair_baseline(questions: Sequence[Mapping[str, Any]], documents: Iterable[str]) -> float:
    """Accuracy, 0 to 1, of choosing the answer whose words most often share a sentence with words of the question.

    A choice's score is the sum of log(count + 1) over the pairs of a word of the question or of the choice with a word
    of the choice; the count is the number of sentences in `documents` that have both. Tied choices share the point
    equally.
    """
    asked = {word for question in questions for text in question["choices"] for word in words_of(text)}
    sentences = Counter(sentence for document in documents for sentence in re.split(r"[.!?\n]", document))
    counts: Counter[tuple[str, str]] = Counter()
    for sentence, times in sentences.items():  # many are repeated
        found = set(words_of(sentence))
        for pair in product(found, found & asked):
            counts[pair] += times

    def score(context: str, choice: str) -> float:
        chosen = set(words_of(choice))
        pairs = product(sorted(chosen | set(words_of(context))), sorted(chosen))
        return sum(log(counts[pair] + 1) for pair in pairs if pair[0] != pair[1])

    return _accuracy(questions, score)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of the letters a to z."""
    return re.findall(r"[a-z]+", text.lower())


def _accuracy(questions: Iterable[Mapping[str, Any]], score: Callable[[str, str], float]) -> float:
    """Accuracy of always choosing the answer with the highest score; tied choices share the point equally."""
    points: list[float] = []
    for question in questions:
        scores = [round(score(question["context"], choice), 9) for choice in question["choices"]]
        best = max(scores)
        points.append((scores[question["answer"]] == best) / scores.count(best))
    return sum(points) / max(len(points), 1)

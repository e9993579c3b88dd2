"""Items of the offline tasks: the same for the same Python, none of them from a file the demo model was trained on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from testbed.demo.corpus import Document
from testbed.evaluation import kinds
from testbed.evaluation.kinds import Candidate, Find
from testbed.evaluation.source import fingerprint, read_source, seen_in_training

STDLIB, EVERY_KIND = "stdlib", "stdlib_all"  # tags: the tasks chosen, and all that were tried
FRESH = "stdlib_fresh"  # further items of the tasks chosen: none of them had a part in choosing
ITEMS_PER_KIND = 120
ITEMS_PER_FILE = 6  # of one kind
NAME = r"^\s*([A-Za-z_][A-Za-z_0-9]*)"
LINE = r"^([^\n]*)"


@dataclass(frozen=True, slots=True)
class Kind:
    """A task: where its items come from, and how an answer is read. `answer` is empty for multiple choice."""

    name: str
    find: Find
    largest_share: float  # of the items that may have the same answer
    answer: str = ""  # a regular expression whose group is the answer in what was generated
    tags: tuple[str, ...] = (STDLIB, EVERY_KIND)


# In `stdlib`: those where the 95 % interval of the plain demo model is 25 points above chance (docs/evaluation.md).
KINDS = (
    Kind("stdlib_closers", kinds.closers, 1 / len(kinds.CLOSERS)),
    Kind("stdlib_names", kinds.names, 0.05),
    Kind("stdlib_lines", kinds.lines, 0.05),
    Kind("stdlib_attributes", kinds.attributes, 0.05, NAME),
    Kind("stdlib_assignments", kinds.assignments, 0.05, NAME),
    Kind("stdlib_statements", kinds.statements, 1 / len(kinds.STATEMENTS), tags=(EVERY_KIND,)),
    Kind("stdlib_line_ends", kinds.line_ends, 0.1, LINE, tags=(EVERY_KIND,)),
)


@dataclass(frozen=True, slots=True)
class Task:
    """A kind with its items."""

    kind: Kind
    items: tuple[Candidate, ...]

    @property
    def chance(self) -> float:
        """The accuracy of who knows nothing but the choices; of generated answers: of who always says the same."""
        if not self.kind.answer:
            return 1 / kinds.CHOICES
        return max(Counter(item.answer for item in self.items).values()) / len(self.items)

    def jsonl(self) -> str:
        return "".join(f"{json.dumps(self._row(item), ensure_ascii=False)}\n" for item in self.items)

    def _row(self, item: Candidate) -> dict[str, object]:
        row: dict[str, object] = {"path": item.path, "place": item.place, "context": item.context}
        if self.kind.answer:
            return {**row, "answer": item.answer}
        return {**row, "choices": list(item.choices), "gold": item.choices.index(item.answer)}


def make_items(held_out: Iterable[Document], training: Iterable[Document]) -> list[Task]:
    """Every kind with its items, and then fresh items of those chosen, where there are any more.

    What stands in a training file with the line before it is left out.
    """
    sources = [source for source in map(read_source, held_out) if source is not None]
    seen = seen_in_training(training)
    tasks, fresh = [], []
    for kind in KINDS:
        found = [item for source in sources for item in kind.find(source) if fingerprint(item.lines) not in seen]
        found.sort(key=lambda item: hashlib.sha256(f"{kind.name}\n{item.path}\n{item.place}".encode()).digest())
        tasks.append(Task(kind, _chosen(kind, found)))
        asked = {item.context for item in tasks[-1].items}
        more = _chosen(kind, [item for item in found if item.context not in asked]) if STDLIB in kind.tags else ()
        if more:
            fresh.append(Task(replace(kind, name=kind.name.replace(STDLIB, FRESH), tags=(FRESH,)), more))
    return [*tasks, *fresh]


def _chosen(kind: Kind, found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The first of them, with no file and no answer too often among them."""
    per_answer: Counter[str] = Counter()
    per_file: Counter[str] = Counter()
    chosen: list[Candidate] = []
    contexts: set[str] = set()
    for item in found:
        often = per_answer[item.answer] >= kind.largest_share * ITEMS_PER_KIND or per_file[item.path] >= ITEMS_PER_FILE
        if not often and item.context not in contexts and len(chosen) < ITEMS_PER_KIND:
            chosen.append(item)
            contexts.add(item.context)
            per_answer[item.answer] += 1
            per_file[item.path] += 1
    return tuple(chosen)

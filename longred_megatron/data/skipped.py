"""What of the input was passed over: every bad document is counted, and named at the end."""

from dataclasses import dataclass, field

from longred_megatron.errors import UserError

PLACES_NAMED = 3  # of each kind
# Where so many come before the first good document, it is not the documents: a wrong --text-key, say.
BAD_BEFORE_FIRST_GOOD = 1000


@dataclass(frozen=True)
class Bad:
    """A document, file or folder that gives no text: what it is, where, and what is known beside it."""

    kind: str  # "not a line of JSON": the same words for all of a kind
    where: str  # a path, for a line with its number
    detail: str = ""
    advice: str = "fix or remove it"

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}{f' ({self.detail})' if self.detail else ''}; {self.advice}"


@dataclass
class Kind:
    """How many there are of a kind, and the first few."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.places) < PLACES_NAMED:
            self.places.append(where)


class Skipped:
    """The tally of an input: good documents, bad ones, and files that were never meant to be documents.

    A bad document is skipped, counted and named. More than half of them bad, or none good, is an error.
    """

    def __init__(self) -> None:
        self.num_good = 0
        self.bad: dict[str, Kind] = {}
        self.others: dict[str, Kind] = {}  # files of other kinds, and the like: named, and no sign of damage
        self._first_bad: Bad | None = None

    def add(self, bad: Bad) -> None:
        """Raises: `UserError` for the thousandth bad document before the first good one."""
        self._first_bad = self._first_bad or bad
        kind = self.bad.setdefault(bad.kind, Kind())
        kind.add(_printable(f"{bad.where} ({bad.detail})" if bad.detail and not kind.places else bad.where))
        if self.num_good == 0 and self._num_bad() == BAD_BEFORE_FIRST_GOOD:
            self.check()

    def pass_over(self, kind: str, where: str) -> None:
        self.others.setdefault(kind, Kind()).add(_printable(where))

    def check(self) -> None:
        """Raises: `UserError` if more than half of the documents are bad, or none is good."""
        num_bad = self._num_bad()
        if self._first_bad and (num_bad > self.num_good or self.num_good == 0):
            first = _printable(str(self._first_bad))
            if num_bad == 1:
                raise UserError(first)
            raise UserError(
                f"{num_bad:,} of the first {num_bad + self.num_good:,} documents are bad, and at most half may be: "
                f"{'; '.join(named(self.bad))}. The first: {first}"
            )

    def _num_bad(self) -> int:
        return sum(kind.count for kind in self.bad.values())


def named(kinds: dict[str, Kind]) -> list[str]:
    """For people: how many of each kind, and the first places."""
    return [
        f"{name} ({kind.count:,}): {', '.join(kind.places)}{', ...' if kind.count > len(kind.places) else ''}"
        for name, kind in kinds.items()
    ]


def _printable(text: str) -> str:
    """Names of files may hold line ends, and bytes that are no characters."""
    return repr(text)[1:-1]

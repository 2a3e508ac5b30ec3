"""Wildcards in prompts: `{a red|a blue} fish in __place__`, chosen by the seed of the sample.

The grammar is that of dynamic prompts, as users of A1111's extensions know it:

    {a|b|c}         one of them; an alternative may be empty, and hold braces of its own
    {3::a|b}        `a` is three times as likely as `b`
    {2$$a|b|c}      two different ones, joined by ", "; {2$$ and $$a|b|c}: joined by " and "
    {1-3$$a|b|c}    one to three different ones, in a drawn order
    __place__       a line of place.txt; __a/b__ one of a/b.txt, __a/*__ one of all files that fit
    \\{ \\} \\| \\_ \\\\  the characters themselves

A line of a file may have a weight and alternatives, too; `#` begins a comment line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.contract.errors import ConfigError
from trainer.contract.registry import nearest

MAX_DEPTH = 12
"""Files within files, and braces within braces."""
MAX_DRAWS = 10_000
"""Choices that one prompt may take."""
MAX_LENGTH = 20_000
"""Characters of a prompt that wildcards may make."""

_NAME = re.compile(r"__([A-Za-z0-9*][A-Za-z0-9*_./ -]*?)__")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})::")
_COUNT = re.compile(r"\s*(\d{1,4})?\s*(-)?\s*(\d{1,4})?\s*\$\$")
_JOINER = re.compile(r"((?:[^{}|$\\]|\\.)*)\$\$", re.DOTALL)
_ESCAPED = "{}|_$:\\"


@dataclass(frozen=True, slots=True)
class Text:
    """Characters as they are."""

    text: str


@dataclass(frozen=True, slots=True)
class Name:
    """`__name__`: a line of a file."""

    name: str


@dataclass(frozen=True, slots=True)
class Choice:
    """`{a|b|c}`: `least` to `most` of the alternatives, each with its weight."""

    alternatives: tuple[tuple[float, Template], ...]
    least: int = 1
    most: int = 1
    joiner: str | None = None
    """Between several; None: there was no count, and the one is taken as it is."""


Template = tuple[Text | Name | Choice, ...]
"""A prompt, read: the parts follow each other."""


def parse(text: str) -> Template:
    """Read a prompt with wildcards.

    Raises:
        ConfigError: a brace is not closed or not opened, or a count or weight makes no sense.
    """
    return _Parser(text).whole()


@dataclass(slots=True)
class Wildcards:
    """Expands prompts, with the files of one folder."""

    folder: Path
    _lines: dict[str, list[tuple[float, Template]]] = field(default_factory=dict)

    def expand(self, text: str, seed: int, use: str = "prompt") -> str:
        """Return the prompt that a template becomes.

        The same template, seed and files give the same prompt, on every machine.

        Args:
            text: the template.
            seed: of the sample.
            use: what it is for; two uses of one seed draw independently.

        Raises:
            ConfigError: it is not well formed, or a file is missing, empty, or refers to itself.
        """
        return self._expanded(parse(text), _Dice(f"{use}:{seed}"), ())

    def _expanded(self, template: Template, dice: _Dice, names: tuple[str, ...]) -> str:
        parts: list[str] = []
        for part in template:
            match part:
                case Text():
                    parts.append(part.text)
                case Name():
                    lines = self._lines_of(part.name, names)
                    _, chosen = lines[dice.weighted([weight for weight, _ in lines])]
                    parts.append(self._expanded(chosen, dice, (*names, part.name)))
                case Choice():
                    parts.append(self._chosen(part, dice, names))
        text = "".join(parts)
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"the wildcards make a prompt of more than {MAX_LENGTH} characters")
        return text

    def _chosen(self, choice: Choice, dice: _Dice, names: tuple[str, ...]) -> str:
        left = [pair for pair in choice.alternatives if pair[0] > 0]
        num = choice.least + dice.below(min(choice.most, len(left)) - choice.least + 1)
        chosen: list[str] = []
        for _ in range(num):
            _, template = left.pop(dice.weighted([weight for weight, _ in left]))
            chosen.append(self._expanded(template, dice, names))
        if choice.joiner is None:
            return chosen[0]
        return choice.joiner.join(text.strip() for text in chosen)

    def _lines_of(self, name: str, names: tuple[str, ...]) -> list[tuple[float, Template]]:
        if name in names or len(names) > MAX_DEPTH:
            way = " -> ".join(f"__{part}__" for part in (*names, name))
            raise ConfigError(f"wildcards go round in a circle: {way}")
        if name not in self._lines:
            self._lines[name] = [line for path in self._files(name) for line in _read(path)]
            if not any(weight > 0 for weight, _ in self._lines[name]):
                raise ConfigError(f"__{name}__ has no line to choose from in {self.folder}")
        return self._lines[name]

    def _files(self, name: str) -> list[Path]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"__{name}__ leads out of {self.folder}")
        if "**" in name:
            raise ConfigError(f"__{name}__: ** is not known", hint="* stands for a part of a name")
        found = sorted(path for path in self.folder.glob(f"{name}.txt") if path.is_file())
        if found:
            return found
        known = [
            path.relative_to(self.folder).with_suffix("").as_posix()
            for path in sorted(self.folder.rglob("*.txt"))
        ]
        raise ConfigError(
            f"no file for __{name}__: {self.folder / name}.txt",
            hint=nearest(name, known) if known else f"there is no .txt file in {self.folder}",
        )


def escape(text: str) -> str:
    r"""Return a template that becomes `text` as it is: `{` is written `\{`."""
    return re.sub(r"[{}|_\\]", lambda match: f"\\{match[0]}", text)


class _Dice:
    """Draws by a hash: the same on every machine and with every version of Python."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._drawn = 0

    def below(self, limit: int) -> int:
        """Return a whole number from 0 to `limit` - 1."""
        return min(int(self._fraction() * limit), limit - 1) if limit > 1 else 0

    def weighted(self, weights: Sequence[float]) -> int:
        """Return an index, drawn in proportion to its weight; at least one is above 0."""
        point = self._fraction() * sum(weights)
        for index, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return index
        return max(index for index, weight in enumerate(weights) if weight > 0)

    def _fraction(self) -> float:
        if self._drawn == MAX_DRAWS:
            raise ConfigError(f"the wildcards of a prompt are drawn more than {MAX_DRAWS} times")
        digest = hashlib.blake2b(f"{self._key}:{self._drawn}".encode(), digest_size=8).digest()
        self._drawn += 1
        return (int.from_bytes(digest, "big") >> 11) / 2**53


class _Parser:
    """Reads a template from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def whole(self) -> Template:
        template = self._template(ends="}", depth=0)
        if self._at < len(self._text):
            raise self._error("a } without its {")
        return template

    def _template(self, ends: str, depth: int) -> Template:
        if depth > MAX_DEPTH:
            raise self._error(f"braces within braces, more than {MAX_DEPTH} deep")
        parts: list[Text | Name | Choice] = []
        after_dollar = False
        while self._at < len(self._text) and (character := self._text[self._at]) not in ends:
            if character == "\\" and self._text[self._at + 1 : self._at + 2] in tuple(_ESCAPED):
                parts.append(Text(self._text[self._at + 1]))
                self._at += 2
            elif character == "{":
                if after_dollar:
                    raise self._error("${...}: variables are not known", r"write \$ for a dollar")
                parts.append(self._choice(depth + 1))
            elif match := _NAME.match(self._text, self._at):
                parts.append(Name(match[1].strip()))
                self._at = match.end()
            else:
                parts.append(Text(character))
                self._at += 1
                after_dollar = character == "$"
                continue
            after_dollar = False
        return tuple(_joined(parts))

    def _choice(self, depth: int) -> Choice:
        start = self._at
        self._at += 1
        count = self._count()
        alternatives: list[tuple[float, Template]] = []
        while True:
            weight = _WEIGHT.match(self._text, self._at)
            self._at = weight.end() if weight else self._at
            template = self._template(ends="|}", depth=depth)
            alternatives.append((float(weight[1]) if weight else 1.0, template))
            if self._at >= len(self._text):
                self._at = start
                raise self._error("a { that is not closed", r"write \{ for the character itself")
            self._at += 1
            if self._text[self._at - 1] == "}":
                break
        return self._checked(start, count, tuple(alternatives))

    def _count(self) -> tuple[int, int | None, str] | None:
        """Return least, most (None: all) and joiner of `2$$`, `1-3$$` or `-2$$ and $$`."""
        match = _COUNT.match(self._text, self._at)
        if match is None or not (match[1] or match[3]):
            return None
        self._at = match.end()
        least = int(match[1]) if match[1] else 0
        most = int(match[3]) if match[3] else None if match[2] else least
        joiner = _JOINER.match(self._text, self._at)
        if joiner is None:
            return least, most, ", "
        self._at = joiner.end()
        return least, most, re.sub(r"\\(.)", r"\1", joiner[1])

    def _checked(
        self,
        start: int,
        count: tuple[int, int | None, str] | None,
        alternatives: tuple[tuple[float, Template], ...],
    ) -> Choice:
        end, self._at = self._at, start
        possible = sum(weight > 0 for weight, _ in alternatives)
        least, most, joiner = count or (1, 1, None)
        most = possible if most is None else most
        if least > most:
            raise self._error(f"{least} to {most} are none")
        if not possible:
            raise self._error("every alternative has the weight 0")
        if least > possible:
            raise self._error(f"{least} of {possible} alternatives cannot be different ones")
        self._at = end
        return Choice(alternatives, least, most, joiner)

    def _error(self, message: str, hint: str = "") -> ConfigError:
        near = self._text[self._at : self._at + 30]
        return ConfigError(
            f"wildcards: {message}, at {near!r} (character {self._at + 1})", hint=hint
        )


def _joined(parts: Sequence[Text | Name | Choice]) -> Iterator[Text | Name | Choice]:
    text = ""
    for part in parts:
        if isinstance(part, Text):
            text += part.text
            continue
        if text:
            yield Text(text)
        text = ""
        yield part
    if text:
        yield Text(text)


def _read(path: Path) -> Iterator[tuple[float, Template]]:
    """Yield weight and template of each line of a file.

    Raises:
        ConfigError: it cannot be read, or a line is not well formed.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="it must be UTF-8 text") from error
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        weight = _WEIGHT.match(stripped)
        try:
            template = parse(stripped[weight.end() :] if weight else stripped)
        except ConfigError as error:
            raise ConfigError(f"{path}:{number}: {error.message}", hint=error.hint) from None
        yield (float(weight[1]) if weight else 1.0), template

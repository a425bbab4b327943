"""Whether a message keeps its contract: the rules written at its fields (rules.proto), checked in a few microseconds.

Types alone say little: NaN is a float, an empty id a string, an enum of a later version a number. Whoever takes a
message from outside its process calls `check` once, after the signature and before anything else reads it.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from esper_leyline.v1.rules_pb2 import FieldRule, contract, rule

VERSION: Final = 1
"""Of every message that has a version; any other is refused."""
MAX_STRING_BYTES: Final = 256
"""Of a string whose field says nothing else."""
_MISSING: Final = "is missing"
_PACKAGE: Final = "esper_leyline.v1"
_FLOATS: Final = frozenset({FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE})

Check = Callable[[Any], str]
"""What is wrong with a value that is set; empty when nothing is."""


class ContractError(ValueError):
    """A message that breaks its contract. `field` is its path, such as metadata.risk.reason."""

    def __init__(self, message: str, field: str, problem: str) -> None:
        super().__init__(f"{message}.{field} {problem}")
        self.message = message
        self.field = field
        self.problem = problem

    @property
    def wrong_version(self) -> bool:
        return self.field == "version"

    @property
    def missing(self) -> bool:
        """The field must be there, and is not."""
        return self.problem == _MISSING


def check(message: Message) -> None:
    """ContractError for the first rule that the message breaks."""
    found = _broken(message)
    if found is not None:
        raise ContractError(message.DESCRIPTOR.name, *found)


def max_bytes(kind: type[Message]) -> int:
    """Of a serialized message of this kind; 0: not bounded as a whole."""
    return _limit(kind.DESCRIPTOR)


def rule_of(one: FieldDescriptor) -> FieldRule:
    """Empty for a field that has none."""
    options: Any = one.GetOptions()  # the stubs of generated extensions know their container by another name
    found: FieldRule = options.Extensions[rule]
    return found


def _limit(kind: Any) -> int:
    return int(kind.GetOptions().Extensions[contract].max_bytes)


@dataclass(slots=True)
class _Plan:
    """What is checked of one kind of message."""

    max_bytes: int
    required: dict[int, tuple[str, str]] = field(default_factory=dict)
    """By field number: name, and what to say when it is missing."""
    ranges: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Of single numbers. Apart from the other checks because most fields are such, and no call is the cheapest one."""
    checks: dict[int, Check] = field(default_factory=dict)


def _broken(message: Message) -> tuple[str, str] | None:
    """(path of the field, what is wrong with it) or None."""
    plan = _plan(message.DESCRIPTOR)
    if plan.max_bytes and message.ByteSize() > plan.max_bytes:
        return "", f"has {message.ByteSize()} bytes; at most {plan.max_bytes}"
    ranges, checks = plan.ranges, plan.checks
    present = message.ListFields()
    for one, value in present:
        number = one.number
        if number in ranges:
            lowest, highest = ranges[number]
            if not lowest <= value <= highest:
                return one.name, _outside(value, lowest, highest)
        elif number in checks and (problem := checks[number](value)):
            name, _, rest = problem.partition("\0")
            return (f"{one.name}{name}", rest) if rest else (one.name, problem)
    if plan.required:
        numbers = {one.number for one, _ in present}
        for number, missing in plan.required.items():
            if number not in numbers:
                return missing
    return None


@cache
def _plan(kind: Descriptor) -> _Plan:
    plan = _Plan(_limit(kind))
    for one in kind.fields:
        rules = rule_of(one)
        if rules.HasField("equals"):
            plan.required[one.number] = (one.name, f"is 0; it must be {rules.equals}")
        elif rules.required:
            plan.required[one.number] = (one.name, _MISSING)
        elif rules.min > 0 and not one.has_presence:
            plan.required[one.number] = (one.name, f"is 0; at least {_number_text(rules.min)}")
        limits, single = _range_of(one, rules), _check_of(one, rules)
        if one.is_repeated:
            plan.checks[one.number] = _each(single if limits is None else _number(*limits), rules.max_items)
        elif limits is not None:
            plan.ranges[one.number] = limits
        elif single is not None:
            plan.checks[one.number] = single
    return plan


def _range_of(one: FieldDescriptor, rules: FieldRule) -> tuple[float, float] | None:
    """Of a number. The greatest float as a bound keeps NaN and infinities out."""
    if rules.HasField("equals"):
        return rules.equals, rules.equals
    if rules.may_be_infinite or (one.cpp_type not in _FLOATS and not (rules.HasField("min") or rules.HasField("max"))):
        return None
    lowest = rules.min if rules.HasField("min") else -sys.float_info.max
    return lowest, rules.max if rules.HasField("max") else sys.float_info.max


def _outside(value: float, lowest: float, highest: float) -> str:
    if not math.isfinite(value):
        return f"is {value}; it must be finite"
    bound, said = ("at least", lowest) if value < lowest else ("at most", highest)
    return f"is {_number_text(value)}; {'it must be' if lowest == highest else bound} {_number_text(said)}"


def _number_text(value: float) -> str:
    """Whole numbers in full; a float32 without the digits that it does not have."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.6g}"


def _check_of(one: FieldDescriptor, rules: FieldRule) -> Check | None:
    """Of one value of a field that is no number."""
    if one.message_type is not None:
        return _inner if one.message_type.file.package == _PACKAGE else None
    if one.enum_type is not None:
        known = frozenset(one.enum_type.values_by_number)
        return lambda value: "" if value in known else f"is {value}, which nobody knows"
    if one.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(rules.max_bytes)
    if one.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _text(rules.max_bytes or MAX_STRING_BYTES)
    return None


def _inner(message: Message) -> str:
    found = _broken(message)
    return "" if found is None else f".{found[0]}\0{found[1]}"


def _bytes(limit: int) -> Check:
    return lambda value: "" if len(value) <= limit else f"has {len(value)} bytes; at most {limit}"


def _text(limit: int) -> Check:
    def problem(value: str) -> str:
        # A character has 4 bytes at most: most texts are so short that they need not be encoded.
        if len(value) * 4 <= limit or (size := len(value.encode())) <= limit:
            return ""
        return f"has {size} bytes; at most {limit}"

    return problem


def _number(lowest: float, highest: float) -> Check:
    return lambda value: "" if lowest <= value <= highest else _outside(value, lowest, highest)


def _each(one: Check | None, limit: int) -> Check:
    def problem(values: Any) -> str:
        if len(values) > limit:
            return f"has {len(values)} elements; at most {limit}"
        for index, value in enumerate(values):
            found = "" if one is None else one(value)
            if found:
                name, separator, rest = found.partition("\0")
                return f"[{index}]{name}\0{rest}" if separator else f"[{index}]\0{found}"
        return ""

    return problem

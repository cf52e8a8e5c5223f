"""Mutates protobuf messages: field by field with their descriptors, and as serialised bytes."""

from __future__ import annotations

from random import Random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tests.fuzz import values

M = TypeVar("M", bound=Message)

_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}
_MAX_DEPTH = 4


def mutated(random: Random, message: M) -> M | None:
    """A changed copy; None where its bytes are no message any more (gRPC answers that before we see it)."""
    copy = type(message)()
    if random.random() < 0.2:
        try:
            copy.ParseFromString(values.flip(random, message.SerializeToString()))
        except DecodeError:
            return None
        return copy
    copy.CopyFrom(message)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        edit(random, random.choice(_all(copy)))
    return copy


def other_number(random: Random, message: M, widths: dict[str, int]) -> M:
    """A copy in which one number of one column is another. `widths` in bytes by column."""
    copy = type(message)()
    copy.CopyFrom(message)
    columns = [name for name in widths if getattr(message, name)]
    if columns:
        name = random.choice(columns)
        setattr(copy, name, values.other_number(random, getattr(message, name), widths[name]))
    return copy


def invented(random: Random, kind: type[M]) -> M | None:
    """A message out of nothing: random bytes, or random fields."""
    message = kind()
    if random.random() < 0.2:
        try:
            message.ParseFromString(random.randbytes(random.randrange(64)))
        except DecodeError:
            return None
        return message
    fill(random, message, 0)
    return message


def edit(random: Random, message: Message) -> None:
    """Change one field."""
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    # Fields that are set matter more than those that are not.
    present = [field for field, _ in message.ListFields()]
    field = random.choice(present) if present and random.random() < 0.7 else random.choice(fields)
    if _is_map(field):
        _edit_map(random, message, field)
    elif field.is_repeated:
        _edit_list(random, message, field)
    elif random.random() < 0.15:
        message.ClearField(field.name)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        inner = getattr(message, field.name)
        inner.SetInParent()
        fill(random, inner, 1)
    else:
        setattr(message, field.name, _scalar(random, field, getattr(message, field.name)))


def fill(random: Random, message: Message, depth: int) -> None:
    """Set random fields."""
    for field in message.DESCRIPTOR.fields:
        if random.random() < 0.5:
            continue
        if _is_map(field):
            _edit_map(random, message, field)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth >= _MAX_DEPTH:
                continue
            inner = getattr(message, field.name)
            if field.is_repeated:
                for _ in range(random.randrange(3)):
                    fill(random, inner.add(), depth + 1)
            else:
                inner.SetInParent()
                fill(random, inner, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(_scalar(random, field, None) for _ in range(random.randrange(4)))
        else:
            setattr(message, field.name, _scalar(random, field, None))


def _all(message: Message) -> list[Message]:
    found = [message]
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE or _is_map(field):
            continue
        for inner in value if field.is_repeated else (value,):
            found += _all(inner)
    return found


def _is_map(field: Any) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def _edit_map(random: Random, message: Message, field: Any) -> None:
    entries = getattr(message, field.name)
    if len(entries) and random.random() < 0.3:
        entries.pop(random.choice(list(entries)))
        return
    key_field, value_field = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
    count = random.choice((1, 1, 2, 1100)) if random.random() < 0.1 else 1
    for _ in range(count):
        key = _scalar(random, key_field, None)
        if value_field.type == FieldDescriptor.TYPE_MESSAGE:
            fill(random, entries[key], _MAX_DEPTH)
        else:
            entries[key] = _scalar(random, value_field, None)


def _edit_list(random: Random, message: Message, field: Any) -> None:
    items = getattr(message, field.name)
    kind = random.randrange(4)
    if len(items) and kind == 0:
        del items[random.randrange(len(items))]
    elif len(items) and kind == 1:
        again = items[random.randrange(len(items))]
        items.extend([again] * random.choice((1, 1, 2, 40)))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        fill(random, items[random.randrange(len(items))] if len(items) and kind == 2 else items.add(), 1)
    elif len(items) and kind == 2:
        at = random.randrange(len(items))
        items[at] = _scalar(random, field, items[at])
    else:
        items.extend(_scalar(random, field, None) for _ in range(random.choice((1, 1, 3, 200))))


def _scalar(random: Random, field: Any, old: Any) -> Any:
    kind = field.type
    if kind in _RANGES:
        if isinstance(old, int) and random.random() < 0.4:
            near = old + random.choice((-1, 1))
            return min(max(near, _RANGES[kind][0]), _RANGES[kind][1])
        return values.integer(random, *_RANGES[kind])
    if kind in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return values.number(random)
    if kind == FieldDescriptor.TYPE_BOOL:
        return random.random() < 0.5
    if kind == FieldDescriptor.TYPE_ENUM:
        known = list(field.enum_type.values_by_number)
        return random.choice(known) if random.random() < 0.7 else values.integer(random, -(1 << 31), (1 << 31) - 1)
    if kind == FieldDescriptor.TYPE_STRING:
        return values.text(random)
    assert kind == FieldDescriptor.TYPE_BYTES, field.full_name
    return values.column(random, old or b"")

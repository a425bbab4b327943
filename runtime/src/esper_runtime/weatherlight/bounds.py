"""Limits on what the trainer may put into a report: its process runs user code, and the log and Redis are shared."""

from typing import Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MAX_TEXT_BYTES: Final = 2048
MAX_ITEMS: Final = 32

M = TypeVar("M", bound=Message)


def bounded(message: M) -> M:
    """The message with every text cut to MAX_TEXT_BYTES and every list to MAX_ITEMS, in place."""
    for field, value in message.ListFields():
        if field.is_repeated:
            del value[MAX_ITEMS:]
            if field.type == FieldDescriptor.TYPE_STRING:
                value[:] = [cut(text) for text in value]
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                for item in value:
                    bounded(item)
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, cut(value))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            bounded(value)
    return message


def cut(text: str, limit: int = MAX_TEXT_BYTES) -> str:
    """At most `limit` bytes of UTF-8, never half a character."""
    raw = text.encode()
    return text if len(raw) <= limit else raw[:limit].decode(errors="ignore")

"""Messages with every field set, and their bytes; for tests/golden."""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import esper_leyline.v1
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

GOLDEN = Path(__file__).resolve().parents[1] / "golden/leyline_v1.json"

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT64,
}
_FLOATS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}


def message_types() -> dict[str, type[Message]]:
    """Every message of esper_leyline.v1 by its name."""
    found = {}
    for module in pkgutil.iter_modules(esper_leyline.v1.__path__):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(f"esper_leyline.v1.{module.name}").DESCRIPTOR
            found |= {name: GetMessageClass(one) for name, one in file.message_types_by_name.items()}
    return found


def filled(kind: type[Message], depth: int = 0) -> Message:
    """Every field set to a value of its own; of a oneof, all members in turn would be too many: the last counts."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        _set(message, field, depth)
    return message


def _set(message: Any, field: FieldDescriptor, depth: int) -> None:
    repeated = field.is_repeated
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if depth < 3:
            inner = filled(GetMessageClass(field.message_type), depth + 1)
            (getattr(message, field.name).add() if repeated else getattr(message, field.name)).CopyFrom(inner)
        return
    value = _value(field)
    if repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def _value(field: FieldDescriptor) -> Any:
    if field.cpp_type in _INTEGERS:
        return 1000 + field.number
    if field.cpp_type in _FLOATS:
        return field.number + 0.5  # exact in binary
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return field.enum_type.values[-1].number
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes([field.number % 256, 0, 255])
    return f"{field.name} ü"


def entry(message: Message) -> dict[str, Any]:
    """Bytes as hex, and what they mean in proto names."""
    return {
        "hex": message.SerializeToString(deterministic=True).hex(),
        "fields": MessageToDict(message, preserving_proto_field_name=True),
    }

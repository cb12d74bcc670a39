"""What a PyTorch file's pickle says, read as plain data: which storages there are, and which tensors lie in them.

A pickle is a program for a small stack machine (Python's `pickletools` describes it). Here is that machine without
anything that could act: a name of a Python object is only looked for in a closed list, to call one of them is to note
where a tensor lies, and whatever else a pickle can ask for is refused by name. Nothing is imported or unpickled.
"""

import struct
from collections.abc import Callable, Iterator
from math import prod
from reprlib import repr as brief  # what a file says may be long or deep without end
from typing import Any, NamedTuple, TypeAlias

from m3jax.checkpoints.headers import can_exist, damaged
from m3jax.checkpoints.protocol import DTYPE_NAMES, DTYPES
from m3jax.errors import M3Error

_MOST_STEPS = 2**22  # of the machine: a tensor takes some forty, so that there is room for 100,000
_MOST_DIGITS = 16  # bytes of an integer: far more than sizes and counters have
_MOST_DIMENSIONS = 64
_LONGEST_NAME = 200  # characters of a name in a sentence
_NEWEST = 5  # protocol of pickles

_STORAGES = {
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8",  # whose tensors say what their entries are
}
_DTYPES = {f"torch.{dtype}": name for dtype, name in DTYPE_NAMES.items()}  # numpy and PyTorch agree on them


class Global(NamedTuple):
    """A name of a Python object, which is never looked up in Python."""

    name: str


class Storage(NamedTuple):
    """Bytes beside the pickle.

    Attributes:
        key: Their name in the archive.
        nbytes: How many there are.
        dtype: What their entries are, by safetensors' name.
    """

    key: str
    nbytes: int
    dtype: str


class StoredTensor(NamedTuple):
    """A tensor and where its entries are.

    Attributes:
        storage: Which bytes it lies in.
        dtype: Its safetensors dtype name.
        offset: Of its first entry, in entries.
        shape: Its dimensions.
        strides: How many entries it is along each dimension from one to the next.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Plain: TypeAlias = Any
"""None, a truth value, a number, a text, a tuple, list or dictionary of such, or one of the classes above."""


def read_pickle(raw: bytes, where: str) -> Plain:
    """What a pickle of tensors says.

    Args:
        raw: The pickle.
        where: What it is called in sentences.

    Returns:
        Plain data. Lists and dictionaries may hold themselves, and the same one may be held often.

    Raises:
        M3Error: It is damaged, or has what a checkpoint of tensors has not.
    """
    return _Machine(raw, where).run()


def tensors_within(value: Plain, seen: set[int]) -> Iterator[StoredTensor]:
    """The tensors in plain data, at any depth.

    Args:
        value: The data.
        seen: What was looked at and is not looked at again, as the same thing may be held often; added to.
    """
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, StoredTensor):
            yield found
        elif type(found) in (dict, list, tuple):
            waiting.extend(found.values() if type(found) is dict else found)


# --- The machine -----------------------------------------------------------------------------------------


class _Machine:
    """One pass over a pickle."""

    def __init__(self, raw: bytes, where: str) -> None:
        self._raw, self._where, self._at = raw, where, 0
        self._stack: list[Plain] = []
        self._below: list[list[Plain]] = []  # the stacks under each mark
        self._memo: dict[int, Plain] = {}

    def run(self) -> Plain:
        """The one value that is left in the end."""
        for _ in range(_MOST_STEPS):
            code = self._take(1)
            if code == b".":
                return self._end()
            step = _STEPS.get(code)
            if step is None:
                raise M3Error(
                    f"{self._where} has the opcode 0x{code.hex()} at byte {self._at - 1:,}, which pickles of tensors do"
                    f" not need: {_MEND}."
                )
            step(self)
        raise damaged(f"{self._where} takes over {_MOST_STEPS:,} steps, more than any model")

    def _end(self) -> Plain:
        value = self._pop()
        if self._stack or self._below:
            raise damaged(f"{self._where} ends with more than one value")
        if self._at < len(self._raw):
            raise damaged(f"{self._where} has {len(self._raw) - self._at:,} bytes after its end")
        return value

    # What the steps are made of

    def _take(self, count: int) -> bytes:
        taken = self._raw[self._at : self._at + count]
        if len(taken) < count:
            raise damaged(f"{self._where} is cut short: at byte {self._at:,} it needs {count:,} more")
        self._at += count
        return taken

    def _number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _text(self, count: int) -> str:
        try:
            return self._take(count).decode()
        except UnicodeDecodeError as error:
            raise damaged(f"{self._where} has a text that is not UTF-8 before byte {self._at:,}") from error

    def _line(self) -> str:
        end = self._raw.find(b"\n", self._at)
        if end < 0:
            raise damaged(f"{self._where} has a name without an end at byte {self._at:,}")
        line = self._text(end - self._at)
        self._at = end + 1
        return line

    def _pop(self) -> Plain:
        if not self._stack:
            raise damaged(f"{self._where} takes a value where there is none, before byte {self._at:,}")
        return self._stack.pop()

    def _pop_tuple(self, count: int) -> tuple[Plain, ...]:
        return tuple(self._pop() for _ in range(count))[::-1]

    def _pop_marked(self) -> list[Plain]:
        if not self._below:
            raise damaged(f"{self._where} goes back to a mark that is not there, before byte {self._at:,}")
        values, self._stack = self._stack, self._below.pop()
        return values

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise damaged(f"{self._where} fills what is no {kind.__name__}, before byte {self._at:,}")
        return self._stack[-1]

    # The steps

    def protocol(self) -> None:
        version = self._number("<B")
        if version > _NEWEST:
            raise damaged(f"{self._where} is of the protocol {version}, which is not known")

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def push(self, value: Plain) -> None:
        self._stack.append(value)

    def push_number(self, layout: str) -> None:
        self.push(self._number(layout))

    def push_text(self, layout: str) -> None:
        self.push(self._text(self._number(layout)))

    def push_long(self) -> None:
        count = self._number("<B")
        if count > _MOST_DIGITS:
            raise damaged(f"{self._where} has an integer of {count} bytes, more than any size has")
        self.push(int.from_bytes(self._take(count), "little", signed=True))

    def push_tuple(self, count: int) -> None:
        self.push(self._pop_tuple(count))

    def push_marked(self) -> None:
        values = tuple(self._pop_marked())
        self.push(values)

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def append_marked(self) -> None:
        values = self._pop_marked()
        self._top(list).extend(values)

    def set_item(self) -> None:
        self._set_items(list(self._pop_tuple(2)))

    def set_marked(self) -> None:
        self._set_items(self._pop_marked())

    def _set_items(self, values: list[Plain]) -> None:
        held: dict[Any, Plain] = self._top(dict)
        if len(values) % 2:
            raise damaged(f"{self._where} has a key without a value, before byte {self._at:,}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int, bool):
                raise M3Error(f"{self._where} has a key that is neither text nor integer: {_MEND}.")
            if key in held:
                raise damaged(f"{self._where} names {brief(key)} twice")
            held[key] = value

    def keep(self, layout: str) -> None:
        place = self._number(layout)
        if not self._stack:
            raise damaged(f"{self._where} keeps a value where there is none, before byte {self._at:,}")
        self._memo[place] = self._stack[-1]

    def keep_next(self) -> None:
        if not self._stack:
            raise damaged(f"{self._where} keeps a value where there is none, before byte {self._at:,}")
        self._memo[len(self._memo)] = self._stack[-1]

    def recall(self, layout: str) -> None:
        place = self._number(layout)
        if place not in self._memo:
            raise damaged(f"{self._where} recalls what was not kept, before byte {self._at:,}")
        self.push(self._memo[place])

    def name(self) -> None:
        module = self._line()
        self._push_global(module, self._line())

    def name_from_stack(self) -> None:
        module, name = self._pop_tuple(2)
        self._push_global(module, name)

    def _push_global(self, module: Plain, name: Plain) -> None:
        said = f"{module}.{name}" if type(module) is str and type(name) is str else "of no name"
        if said not in _KNOWN:
            raise M3Error(
                f"{self._where} names the Python object {said[:_LONGEST_NAME]!r}, which tensors do not need and"
                f" which is never looked up: {_MEND}."
            )
        self.push(Global(said))

    def refer(self) -> None:
        """A storage, which lies beside the pickle."""
        match self._pop():
            case ("storage", Global(kind), str(key), str(_), int(count), *rest) if rest in ([], [None]) and count >= 0:
                if kind in _STORAGES and count < 2**63:
                    dtype = _STORAGES[kind]
                    self.push(Storage(key, count * DTYPES[dtype].itemsize, dtype))
                    return
        raise damaged(f"{self._where} refers to what is no storage, before byte {self._at:,}")

    def call(self) -> None:
        function, values = self._pop_tuple(2)
        self.push(self._called(function, values))

    def _called(self, function: Plain, values: Plain) -> Plain:
        """What a call of one of the known names stands for."""
        match function, values:
            case Global("collections.OrderedDict"), ():
                return {}
            case Global("torch.Size"), (sizes,) if _is_counts(sizes):
                return tuple(sizes)
            # Behind the place come whether gradients are wanted, and hooks, which say nothing of values.
            case Global("torch._utils._rebuild_tensor"), (Storage() as storage, *told) if len(told) == 3:
                return self._tensor(storage, storage.dtype, told, [])
            case Global("torch._utils._rebuild_tensor_v2"), (Storage() as storage, *told) if len(told) in (5, 6):
                return self._tensor(storage, storage.dtype, told[:3], told[5:])
            case Global("torch._utils._rebuild_tensor_v3"), (Storage() as storage, *told) if len(told) in (6, 7):
                if isinstance(told[5], Global) and told[5].name in _DTYPES:
                    return self._tensor(storage, _DTYPES[told[5].name], told[:3], told[6:])
            case Global(name), (StoredTensor() as tensor, bool(_), dict(_), *_) if name in _PARAMETERS:
                return tensor
            case Global("torch._tensor._rebuild_from_type_v2"), (inner, Global(kind), tuple(inside), _):
                # A tensor with attributes. Its function is a plain one, so that calls do not nest.
                if kind in _TYPES and isinstance(inner, Global) and inner.name in _MAKERS:
                    return self._called(inner, inside)
        what = function.name if isinstance(function, Global) else "what is no function"
        raise M3Error(f"{self._where} calls {what} in a way that no tensor is made, before byte {self._at:,}: {_MEND}.")

    def _tensor(self, storage: Storage, dtype: str, place: list[Plain], options: list[Plain]) -> StoredTensor:
        where = f"{self._where} has a tensor, before byte {self._at:,},"
        offset, shape, strides = place
        if not (_is_counts([offset]) and _is_counts(shape) and _is_counts(strides)):
            raise damaged(f"{where} that has no place in its storage")
        if len(shape) != len(strides) or not can_exist(list(shape), dtype):
            raise damaged(f"{where} with the impossible shape {brief(shape)} and strides {brief(strides)}")
        if any(option not in (None, {}) for option in options):
            raise M3Error(
                f"{where} that is to be conjugated or negated when it is read: call .resolve_conj() and .resolve_neg()"
                " on it and save it again."
            )
        room, entries = storage.nbytes // DTYPES[dtype].itemsize, prod(shape)
        reached = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if entries and reached > room:
            raise damaged(
                f"{where} of shape {brief(shape)} that needs {reached:,} entries of storage {brief(storage.key)}, which"
                f" has {room:,}"
            )
        if entries > room:  # so that a small file cannot ask for more memory or disk than it has itself
            raise M3Error(
                f"{where} of {entries:,} entries that repeats the {room:,} of storage {brief(storage.key)}: call"
                " .contiguous() on it and save it again."
            )
        return StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))

    def build(self) -> None:
        """Attributes of an OrderedDict, such as `_metadata`, which is no part of the weights."""
        self._pop()
        self._top(dict)


def _is_counts(value: Plain) -> bool:
    """Whether something is a short tuple or list of integers that could count something on this machine."""
    return (
        type(value) in (tuple, list)
        and len(value) <= _MOST_DIMENSIONS  # before all are looked at: the same list may be given often
        and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)
    )


_MEND = (
    "if you trust who made the file, load the model once in transformers and convert it with"
    " `model.save_pretrained(directory, safe_serialization=True)`"
)
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_MAKERS = (*(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")), *_PARAMETERS)
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_KNOWN = {
    *("collections.OrderedDict", "torch.Size", "torch._tensor._rebuild_from_type_v2"),
    *(*_MAKERS, *_TYPES, *_STORAGES, *_DTYPES),
}


def _with(method: Callable[..., object], *values: Plain) -> Callable[[_Machine], object]:
    return lambda machine: method(machine, *values)


_STEPS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _with(_Machine._take, 8),  # how long a frame is
    b"(": _Machine.mark,
    b"N": _with(_Machine.push, None),
    b"\x88": _with(_Machine.push, True),
    b"\x89": _with(_Machine.push, False),
    b"K": _with(_Machine.push_number, "<B"),
    b"M": _with(_Machine.push_number, "<H"),
    b"J": _with(_Machine.push_number, "<i"),
    b"G": _with(_Machine.push_number, ">d"),
    b"\x8a": _Machine.push_long,
    b"\x8c": _with(_Machine.push_text, "<B"),
    b"X": _with(_Machine.push_text, "<I"),
    b")": _with(_Machine.push, ()),
    b"\x85": _with(_Machine.push_tuple, 1),
    b"\x86": _with(_Machine.push_tuple, 2),
    b"\x87": _with(_Machine.push_tuple, 3),
    b"t": _Machine.push_marked,
    b"]": lambda machine: machine.push([]),
    b"a": _Machine.append,
    b"e": _Machine.append_marked,
    b"}": lambda machine: machine.push({}),
    b"s": _Machine.set_item,
    b"u": _Machine.set_marked,
    b"q": _with(_Machine.keep, "<B"),
    b"r": _with(_Machine.keep, "<I"),
    b"\x94": _Machine.keep_next,
    b"h": _with(_Machine.recall, "<B"),
    b"j": _with(_Machine.recall, "<I"),
    b"c": _Machine.name,
    b"\x93": _Machine.name_from_stack,
    b"Q": _Machine.refer,
    b"R": _Machine.call,
    b"b": _Machine.build,
}

"""Two Python processes that call each other's functions; what crosses between them is plain data.

The candidate's program and its tests run in two processes, so that the program finds neither the tests nor what they
expect. Each process has a `Peer` on one end of a socket. Arguments and results are copied as JSON, with tags for the
builtin types that JSON lacks. A subclass of a builtin type crosses as the builtin, so no `__eq__` crosses with it.
Every other object stays where it is and is known to the other process by a number; there a `Remote` stands for it.

This file runs inside the sandbox, given to Python as text.
"""

import builtins
import importlib
import io
import itertools
import json
import operator
import re
import sys
import threading
from collections import Counter, OrderedDict, deque, namedtuple
from types import BuiltinFunctionType, FunctionType, ModuleType

OUTPUT_LIMIT = 1 << 20
"""Characters that one call may print."""

SCALARS = (bool, int, float, str)
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
MAPPINGS = {"Counter": Counter, "OrderedDict": OrderedDict, "dict": dict}
TEST_OUTCOMES = ("unittest", "pytest", "_pytest", "asyncio", "tabom")
"""Packages whose exceptions end or skip a test; a candidate may not raise them there."""

PATCHED = {name: getattr(builtins, name) for name in ("input", "open", "print")}
"""Functions that tests replace by mocks; the program then calls the mock. Input always comes from the tests."""

PASSIVE_MODULES = ("_io", "argparse", "types")
"""Modules whose objects hold nothing of the tests but what they were made for: files in memory and namespaces."""

OWN_MODULES = ("program", "tests", "__main__", "builtins")
"""Modules that are not the same in both processes, or whose values are copied."""

READABLE = {  # module and class: how the value is written, and how it is made again
    ("builtins", "complex"): (lambda value: [value.real, value.imag], complex),
    ("builtins", "bytes"): (lambda value: [list(value)], bytes),
    ("builtins", "bytearray"): (lambda value: [list(value)], bytearray),
    ("builtins", "range"): (lambda value: [value.start, value.stop, value.step], range),
    ("builtins", "slice"): (lambda value: [value.start, value.stop, value.step], slice),
    ("decimal", "Decimal"): (lambda value: [str(value)], None),
    ("fractions", "Fraction"): (lambda value: [value.numerator, value.denominator], None),
    ("datetime", "datetime"): (lambda value: [*value.timetuple()[:6], value.microsecond, value.tzinfo], None),
    ("datetime", "date"): (lambda value: [value.year, value.month, value.day], None),
    ("datetime", "time"): (lambda value: [value.hour, value.minute, value.second, value.microsecond], None),
    ("datetime", "timezone"): (lambda value: [value.utcoffset(None)], None),
    ("datetime", "timedelta"): (lambda value: [value.days, value.seconds, value.microseconds], None),
    ("pathlib", "PurePosixPath"): (lambda value: [str(value)], None),
    ("pathlib", "PosixPath"): (lambda value: [str(value)], None),
    ("re", "Pattern"): (lambda value: [value.pattern, value.flags], re.compile),
    ("uuid", "UUID"): (lambda value: [str(value)], None),
    ("numpy", "ndarray"): (lambda value: [value.tolist(), str(value.dtype)], None),
}


class Gone(BaseException):
    """The other process ended."""


class NothingToRun(BaseException):
    """The tests contain nothing that can be run here, or need what is not installed."""


class Peer:
    """One end of the connection.

    Args:
        stream: lines in and out.
        is_guarded: the other process is not trusted: it may call the functions that it was given and use the public
            attributes of instances of the classes in `own`, and nothing else.
    """

    def __init__(self, stream: io.BufferedRWPair, is_guarded: bool) -> None:
        self.stream = stream
        self.is_guarded = is_guarded
        self.own: set[str] = set()
        self.objects: dict[int, object] = {}
        self.numbers: dict[int, int] = {}
        self.proxies: dict[int, object] = {}
        self.classes: dict[tuple, type] = {}
        self.globals: dict[str, object] = {}
        self.lock = threading.RLock()

    # What both processes do: send, wait, and answer what is asked meanwhile.

    def send(self, message: dict) -> None:
        """Writes one message."""
        try:
            self.stream.write(json.dumps(message).encode() + b"\n")
            self.stream.flush()
        except OSError:
            raise Gone from None

    def receive(self) -> dict:
        """Reads one message."""
        try:
            line = self.stream.readline()
        except OSError:
            line = b""
        if not line:
            raise Gone
        return json.loads(line)

    def ask(self, operation: str, *operands: object, made: bool = False) -> object:
        """Has the other process do something, and returns or raises what came of it.

        Args:
            made: whether an object that comes back was made at the asker's word; see `Remote`.
        """
        with self.lock:
            patched = ["input", *(name for name, own in PATCHED.items() if getattr(builtins, name) is not own)]
            message = {"do": operation, "with": [self.encode(operand) for operand in operands], "made": made}
            self.send(message | ({"patched": patched} if self.is_guarded else {}))
            return self.wait(operands, made)

    def wait(self, operands: tuple, made: bool) -> object:
        """Answers until the reply comes, and returns or raises it."""
        while True:
            message = self.receive()
            if "do" in message:
                self.answer(message)
                continue
            sys.stdout.write(message.get("printed", ""))
            if "raised" in message:
                raise self.exception(message["raised"], ends_loop=operands[1:] == ("__next__",))
            if "after" in message:
                for operand, value in zip(arguments(*operands), message["after"], strict=True):
                    update(operand, self.decode(value))
            return self.decode(message["returned"], made)

    def serve(self) -> None:
        """Answers until the other process ends."""
        while True:
            self.answer(self.receive())

    def answer(self, message: dict) -> None:
        """Does what the other process asked for."""
        printed, output = io.StringIO(), sys.stdout
        if not self.is_guarded:
            sys.stdout = printed
            vars(builtins).update({name: self.patched(name) for name in message["patched"]})
        try:
            is_given = message["do"] == "builtin" or set(message["with"][0]) == {"yours"}
            if self.is_guarded and not is_given:
                raise PermissionError("only an object that was given can be used")
            operands = [self.decode(operand) for operand in message["with"]]
            result = getattr(self, "do_" + message["do"])(*operands)
            is_made = message.get("made") and message["do"] == "call"
            reply = {"returned": self.encode_reference(result) if is_made else self.encode(result)}
            if message["do"] == "call" and any(map(is_mutable, arguments(*operands))):
                given = arguments(*operands)
                reply["after"] = [self.encode(each) if is_mutable(each) else None for each in given]
        except Gone:
            raise
        except BaseException as error:
            reply = {"raised": self.describe(error)}
        finally:
            sys.stdout = output
            if not self.is_guarded:
                vars(builtins).update({name: PATCHED[name] for name in message["patched"]})
        if printed.tell():
            reply["printed"] = printed.getvalue()[:OUTPUT_LIMIT]
        self.send(reply)

    # What can be asked for.

    def do_global(self, name: str) -> object:
        return self.globals[name]

    def do_builtin(self, name: str, positional: list, named: dict) -> object:
        if name != "input" and getattr(builtins, name) is PATCHED[name]:
            raise PermissionError(f"{name} was not replaced")
        return getattr(builtins, name)(*positional, **named)

    def do_call(self, target: object, positional: list, named: dict) -> object:
        return target(*positional, **named)

    def do_get(self, target: object, name: str) -> object:
        self.guard(target, name)
        return getattr(target, name)

    def do_set(self, target: object, name: str, value: object) -> None:
        self.guard(target, name)
        setattr(target, name, value)

    def do_isinstance(self, target: object, kind: object) -> bool:
        return isinstance(target, kind)

    def do_issubclass(self, target: object, kind: object) -> bool:
        return issubclass(target, kind)

    def do_plain(self, target: object) -> object:
        """The value of an object that is a list, number or text by inheritance, else nothing."""
        return self.encode_plain(target) is not None and Copied(target)

    def do_operate(self, target: object, name: str, *others: object) -> object:
        if self.is_guarded and name not in GUARDED_OPERATIONS:
            self.guard(target, name[2:-2])
        return OPERATIONS[name](target, *others)

    def patched(self, name: str) -> FunctionType:
        """Calls what the tests put in the place of a builtin function."""
        return lambda *positional, **named: self.ask("builtin", name, list(positional), named)

    def guard(self, target: object, name: str) -> None:
        """Refuses what would let a program read or change the tests through an object that they gave it.

        A mock has the attributes that the program may use, and those by which the tests ask and prepare it.
        """
        if not self.is_guarded:
            return
        module = type(target).__module__
        is_open = module in self.own or module in PASSIVE_MODULES
        if module == "unittest.mock":
            is_open = name not in dir(sys.modules[module].NonCallableMock)
        if name.startswith("_") or not is_open:
            raise AttributeError(f"{type(target).__name__!r} object has no attribute {name!r}")

    # How values cross.

    def encode(self, value: object) -> object:
        """A value as JSON: copied where it is plain, else a number that stands for it."""
        if value is None or type(value) in SCALARS:
            return value
        if type(value) in (Remote, RemoteClass):
            return {"yours": value.__dict__["number"]}
        if type(value) is Copied:
            return self.encode_plain(value.value)
        if isinstance(value, BaseException):
            return {"exception": self.describe(value)}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception_class": ancestry(value)}
        plain = self.encode_plain(value)
        return plain if plain is not None else self.encode_reference(value)

    def encode_plain(self, value: object) -> object:
        """The value of an object of a builtin type or a subclass of one; None for any other object."""
        kind = type(value)
        if hasattr(kind, "_fields") and isinstance(value, tuple):
            return {"namedtuple": [kind.__name__, list(kind._fields), [self.encode(each) for each in value]]}
        if is_enumeration(value):
            return None
        for scalar in SCALARS:
            if isinstance(value, scalar):
                return value if scalar is bool else scalar.__getnewargs__(value)[0]
        for name, sequence in SEQUENCES.items():
            if isinstance(value, sequence):
                items = [self.encode(each) for each in sequence.__iter__(value)]
                return items if name == "list" else {name: items}
        for name, mapping in MAPPINGS.items():
            if isinstance(value, mapping):
                return {name: [[self.encode(key), self.encode(each)] for key, each in dict.items(value)]}
        if isinstance(value, {}.keys().__class__ | {}.values().__class__ | {}.items().__class__):
            return {"list": [self.encode(each) for each in value]}
        name = (kind.__module__, kind.__qualname__)
        if name in READABLE:
            return {"value": [*name, [self.encode(part) for part in READABLE[name][0](value)]]}
        if kind.__module__ == "numpy" and hasattr(value, "dtype"):
            return {"value": ["numpy", str(value.dtype), [self.encode(value.item())]]}
        if value is Ellipsis or value is NotImplemented:
            return {"builtin": repr(value)}
        if isinstance(value, type | BuiltinFunctionType) and vars(builtins).get(value.__name__) is value:
            return {"builtin": value.__name__}
        if isinstance(value, ModuleType):
            return {"module": value.__name__}
        return None

    def encode_reference(self, value: object) -> dict:
        """A number for an object that stays here, and what is shown of it."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects[number] = value
        kind = value if isinstance(value, type) else type(value)
        return {"mine": [number, isinstance(value, type), kind.__module__, kind.__qualname__]}

    def decode(self, data: object, made: bool = False) -> object:
        """The value that the other process sent."""
        if isinstance(data, list):
            return [self.decode(each) for each in data]
        if not isinstance(data, dict):
            return data
        [(tag, content)] = data.items()
        if tag in SEQUENCES:
            return SEQUENCES[tag](self.decode(each) for each in content)
        if tag in MAPPINGS:
            return MAPPINGS[tag]({self.decode(key): self.decode(each) for key, each in content})
        return getattr(self, "decode_" + tag)(content, made)

    def decode_yours(self, number: int, made: bool) -> object:
        return self.objects[number]

    def decode_mine(self, content: list, made: bool) -> object:
        number, is_class, module, name = content
        if (module, name) == ("builtins", "coroutine"):
            return self.coroutine(Remote(self, number, module, name))
        if is_class and number not in self.proxies:
            body = {"peer": self, "number": number, "is_trusted": False, "__module__": "program", "__qualname__": name}
            self.proxies[number] = RemoteClass(name.rpartition(".")[2], (), body)
        elif number not in self.proxies:
            self.proxies[number] = Remote(self, number, module, name, made)
        elif not is_class and not made:  # a method that returns its own object in place of a result
            self.proxies[number].__dict__["made"] = False
        return self.proxies[number]

    async def coroutine(self, remote: "Remote") -> object:
        """What a coroutine of the other process returns."""
        return self.ask("operate", remote, "__await__")

    def decode_exception_class(self, names: list, made: bool) -> type:
        return self.exception_class(tuple(map(tuple, names)))

    def decode_namedtuple(self, content: list, made: bool) -> object:
        name, fields, values = content
        kind = self.classes.get((name, *fields)) or self.classes.setdefault((name, *fields), namedtuple(name, fields))
        return kind(*map(self.decode, values))

    def decode_value(self, content: list, made: bool) -> object:
        module, name, parts = content
        parts = list(map(self.decode, parts))
        if module == "numpy":
            numpy = importlib.import_module("numpy")
            return numpy.array(*parts) if name == "ndarray" else numpy.dtype(name).type(*parts)
        known = READABLE[module, name][1] or getattr(importlib.import_module(module), name)
        return known(*parts)

    def decode_builtin(self, name: str, made: bool) -> object:
        value = getattr(builtins, name)
        if self.is_guarded and callable(value) and not isinstance(value, type):
            raise PermissionError(f"the builtin function {name} was returned")  # the tests would call it
        return value

    def decode_module(self, name: str, made: bool) -> object:
        if name in OWN_MODULES:
            raise PermissionError(f"the module {name} was returned")  # the tests would compare it with themselves
        return importlib.import_module(name)

    def decode_exception(self, described: list, made: bool) -> object:
        return self.exception(described, ends_loop=False)

    # How exceptions cross: by the names of their classes.

    def describe(self, error: BaseException) -> list:
        """Classes from the first to the last ancestor, arguments, text and attributes of an exception."""
        names = ancestry(type(error))
        attributes = {name: self.encode_briefly(value) for name, value in vars(error).items() if name[0] != "_"}
        return [names, [self.encode_briefly(argument) for argument in error.args], str(error), attributes]

    def encode_briefly(self, value: object) -> object:
        """A value, or its text where a copy cannot be made."""
        try:
            return self.encode(value)
        except Exception:
            return repr(value)

    def exception(self, described: list, ends_loop: bool) -> BaseException:
        """The exception that the other process described, of the class of that name.

        Args:
            ends_loop: whether a StopIteration is one. Where no next item was asked for, it would end a loop of the
                asker before its time.
        """
        names, arguments, text, attributes = described
        if not ends_loop and any(name in ("StopIteration", "StopAsyncIteration") for _, name in names):
            return RuntimeError(f"the program raised StopIteration: {text}")
        kind = self.exception_class(tuple(map(tuple, names)))
        try:
            error = kind(*map(self.decode, arguments))
        except Exception:
            error = kind.__new__(kind, text)  # without what its own __init__ asks for
            error.args = (text,)
        for name, value in attributes.items():
            if name.startswith("_"):
                continue
            try:
                setattr(error, name, self.decode(value))
            except Exception:
                continue  # an attribute that the class computes
        return error

    def exception_class(self, names: tuple) -> type:
        """The builtin or imported class of this name; else one made here, below its nearest known ancestor."""
        (module, name), *ancestors = names
        if names not in self.classes:
            is_builtin = module == "builtins"
            place = (
                self.globals if module in OWN_MODULES and not is_builtin else vars(sys.modules.get(module, builtins))
            )
            known = place.get(name)
            if not (isinstance(known, type) and issubclass(known, BaseException)):
                known = type(name, (self.exception_class(tuple(ancestors)),), {"__module__": module})
            ends_test = any(kind.__module__.partition(".")[0] in TEST_OUTCOMES for kind in known.__mro__)
            self.classes[names] = RuntimeError if ends_test else known
        return self.classes[names]


def ancestry(kind: type) -> list:
    """Modules and names of an exception's class and its ancestors."""
    return [[each.__module__, each.__qualname__] for each in kind.__mro__ if issubclass(each, BaseException)]


class Copied:
    """A value to be copied, though its class is not a builtin one."""

    def __init__(self, value: object) -> None:
        self.value = value


class Remote:
    """Stands for an object of the other process.

    An object that a call returned is never asked to compare itself with a plain value or to calculate with one: its
    class may be made to answer whatever passes. Only what the asker *made*, by calling a class, and no call has
    returned since, is asked.
    """

    def __init__(self, peer: Peer, number: int, module: str, name: str, made: bool = False) -> None:
        self.__dict__.update(peer=peer, number=number, kind=(module, name), made=made)

    def __getattr__(self, name: str) -> object:
        return self.__dict__["peer"].ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__["peer"].ask("set", self, name, value)

    @property
    def __class__(self) -> type:
        """The class of this name of an installed library, so that isinstance knows what libraries return."""
        module, name = self.__dict__["kind"]
        known = None if module in OWN_MODULES else getattr(sys.modules.get(module), name, None)
        if isinstance(known, type) and known.__module__ != "builtins":
            return known
        return self.__dict__["peer"].ask("get", self, "__class__")

    def __call__(self, *positional: object, **named: object) -> object:
        return self.__dict__["peer"].ask("call", self, list(positional), named)

    def __eq__(self, other: object) -> bool:
        if type(other) is Remote:
            if self.__dict__["number"] == other.__dict__["number"]:
                return True
            return self.__dict__["peer"].ask("operate", self, "__eq__", other) is True
        if self.__dict__["made"]:
            plain = self.__dict__["peer"].ask("plain", self)
            return plain is not False and plain == other
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, item: object) -> bool:
        if self.__dict__["made"] or type(item) is Remote:
            return bool(self.__dict__["peer"].ask("operate", self, "__contains__", item))
        return any(each is item or each == item for each in self)


class RemoteClass(type):
    """Stands for a class of the other process: it can be called, and asked whether an object is its instance.

    What it makes is *made* (see Remote) if it is trusted: if the tests know it by the name of a class, as in `Stack()`.
    Where they know it by the name of a function, it is a function's place that the class has taken.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> None:
        if bases:
            raise NothingToRun(f"the tests derive a class from {bases[0].__name__}, which is in another process")
        super().__init__(name, bases, body)

    def __call__(cls, *positional: object, **named: object) -> object:
        return cls.__dict__["peer"].ask("call", cls, list(positional), named, made=cls.__dict__["is_trusted"])

    def __getattr__(cls, name: str) -> object:
        return cls.__dict__["peer"].ask("get", cls, name)

    def __instancecheck__(cls, instance: object) -> bool:
        return type(instance) is Remote and cls.__dict__["peer"].ask("isinstance", instance, cls)

    def __subclasscheck__(cls, other: type) -> bool:
        return type(other) is RemoteClass and cls.__dict__["peer"].ask("issubclass", other, cls)

    def __iter__(cls) -> object:
        return cls.__dict__["peer"].ask("operate", cls, "__iter__")

    def __getitem__(cls, key: object) -> object:
        return cls.__dict__["peer"].ask("operate", cls, "__getitem__", key)

    def __len__(cls) -> int:
        return cls.__dict__["peer"].ask("operate", cls, "__len__")


def run_coroutine(coroutine: object) -> object:
    """What a coroutine returns."""
    import asyncio

    async def wait() -> object:
        return await coroutine

    return asyncio.run(wait())


def leave(manager: object, error: BaseException | None) -> object:
    """Leaves a context."""
    return type(manager).__exit__(manager, type(error) if error else None, error, None)


CALCULATIONS = [
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift",
    "lt", "le", "gt", "ge",
]  # fmt: skip
OPERATIONS = {
    f"__{name}__": getattr(operator, name if hasattr(operator, name) else name + "_") for name in CALCULATIONS
}


def reflected(function: FunctionType) -> FunctionType:
    """An operator with its operands exchanged."""
    return lambda value, other: function(other, value)


OPERATIONS |= {f"__r{name[2:]}": reflected(function) for name, function in list(OPERATIONS.items())[:-4]}
GUESSES = {
    f"__{name}__": vars(builtins).get(name) or getattr(operator, name)
    for name in [
        "iter", "next", "reversed", "len", "getitem", "setitem", "delitem", "neg", "pos", "abs", "invert", "round",
        "int", "float", "index", "bool", "hash", "str", "repr", "format",
    ]
} | {"__enter__": lambda manager: type(manager).__enter__(manager)}  # fmt: skip
OPERATIONS |= GUESSES | {"__eq__": operator.eq, "__contains__": operator.contains}
OPERATIONS |= {"__await__": run_coroutine, "__exit__": leave}
GUARDED_OPERATIONS = {"__iter__", "__next__", "__len__", "__bool__", "__eq__"}
"""What an untrusted process may do with any object that it was given."""


def forward(name: str, needs_trust: bool) -> FunctionType:
    """A special method that the other process carries out."""

    def method(self: Remote, *others: object) -> object:
        made = self.__dict__["made"]
        if needs_trust and not made and not all(type(other) is Remote for other in others):
            return NotImplemented
        return self.__dict__["peer"].ask("operate", self, name, *others, made=made and needs_trust)

    return method


for special in OPERATIONS.keys() - {"__eq__", "__contains__", "__await__", "__exit__"}:
    setattr(Remote, special, forward(special, special not in GUESSES))
Remote.__doc__ = property(lambda self: self.__dict__["peer"].ask("get", self, "__doc__"))
Remote.__exit__ = lambda self, kind, error, trace: self.__dict__["peer"].ask("operate", self, "__exit__", error)


def arguments(target: object, positional: list, named: dict) -> list:
    """All arguments of a call."""
    return [*positional, *named.values()]


def is_mutable(value: object) -> bool:
    """Whether a call may have changed this argument in place."""
    return type(value) in (list, dict, OrderedDict, Counter, set, deque, bytearray)


def is_enumeration(value: object) -> bool:
    """Whether a value is a member of an enumeration, which is known by its identity."""
    return "enum" in sys.modules and isinstance(value, sys.modules["enum"].Enum)


def update(mine: object, theirs: object) -> None:
    """Makes an argument what it is in the process that was called."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list | deque):
        for place, (old, new) in enumerate(zip(mine, theirs, strict=False)):
            if type(old) is type(new) and is_mutable(old):
                update(old, new)
            else:
                mine[place] = new
        if isinstance(mine, list):
            mine[len(theirs) :] = list(theirs)[len(mine) :]
        else:
            mine.extend(itertools.islice(theirs, len(mine), None))
            while len(mine) > len(theirs):
                mine.pop()
    elif isinstance(mine, dict):
        merged = {key: mine[key] if is_mutable(value) and key in mine else value for key, value in theirs.items()}
        for key, value in theirs.items():
            if merged[key] is not value:
                if type(merged[key]) is type(value):
                    update(merged[key], value)
                else:
                    merged[key] = value
        mine.clear()
        mine.update(merged)
    elif isinstance(mine, set):
        mine.clear()
        mine.update(theirs)
    elif isinstance(mine, bytearray):
        mine[:] = theirs

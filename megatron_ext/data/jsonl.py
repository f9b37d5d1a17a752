"""JSON Lines as input: which files make which domain, and their lines in chunks for workers."""

import glob
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_ext.errors import UserError

Compression = Literal["none", "gzip", "zstd"]

_SUFFIX = re.compile(r"\.jsonl?(\.(gz|zst))?$")
_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OTHER_SUFFIXES = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".zip", ".7z", ".tar", ".parquet")
_OTHER_MAGIC = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x04\x22M\x18": "lz4", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class JsonlFile:
    """One input file; `size` and `mtime_ns` tell whether it changed since."""

    path: Path
    compression: Compression
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file."""

    number: int
    data: bytes
    first_line: int
    """Number of its first line in the file, counted from 1."""
    disk_bytes: int
    """Bytes of the file, as stored, that were read for it."""


class BadLine(Exception):
    """A line that is no document: `reason` is one of a few, for counting; `detail` may be empty."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def resolve_inputs(specs: tuple[str, ...]) -> dict[str, list[JsonlFile]]:
    """Files of each domain, from `NAME=PATH`, `NAME=GLOB`, `NAME=DIRECTORY` or the same unnamed.

    Unnamed, every file is a domain of its own, named after its stem. Files are in sorted order.

    Raises:
        UserError: nothing found, an unusable name, one name for two domains, a compression that
            is not gzip or zstd, or only empty files.
    """
    domains: dict[str, list[JsonlFile]] = {}
    for spec in specs:
        name, separator, pattern = spec.partition("=")
        if not separator or Path(spec).exists():
            name, pattern = "", spec
        paths = _find(pattern)
        groups = {name: paths} if name else {}
        for path in paths if not name else []:
            groups.setdefault(_SUFFIX.sub("", path.name), []).append(path)
        for domain, members in groups.items():
            if not _DOMAIN.fullmatch(domain):
                raise UserError(
                    f"input {spec}: {domain!r} cannot name a domain",
                    "use letters, digits, '.', '_' and '-', as in --input NAME=PATH",
                )
            if domain in domains or (not name and len(members) > 1):
                raise UserError(
                    f"two inputs are called {domain!r}, the second in {spec}",
                    "name them apart with NAME=PATH, or join them: NAME=GLOB or NAME=DIRECTORY",
                )
            files = [_inspect(path) for path in members]
            if not any(file.size for file in files):
                raise UserError(f"domain {domain!r} has no text: {members[0]} is empty")
            domains[domain] = files
    return domains


def read_chunks(file: JsonlFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file into chunks of whole lines, of about `chunk_bytes` decompressed bytes each.

    Raises:
        UserError: the compressed data are damaged or end early.
    """
    line, stored = 1, 0
    number = 0
    with open(file.path, "rb") as source:
        stream: BinaryIO = source
        if file.compression != "none":
            stream = io.BufferedReader(_Decompressor(source, file), 1 << 20)  # type: ignore[assignment]
        while data := stream.read(chunk_bytes):
            if not data.endswith(b"\n"):
                data += stream.readline()
            position = source.tell()
            yield Chunk(number, data, line, position - stored)
            number, stored = number + 1, position
            line += data.count(b"\n")


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a chunk, without their line ends."""
    return data.removesuffix(b"\n").split(b"\n")


def parse_record(line: bytes) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        BadLine: the line holds none.
    """
    try:
        record: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadLine("invalid UTF-8", f"byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        if not line.strip():
            raise BadLine("empty line") from None
        raise BadLine("bad JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadLine("bad JSON", "nested too deeply") from None
    if not isinstance(record, dict):
        raise BadLine("not an object", f"a {type(record).__name__} instead of {{...}}")
    return record


def utf8(text: str) -> bytes:
    r"""The text's UTF-8; a BadLine for "\ud800", which is good JSON but half a character."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadLine("invalid UTF-8", f"lone surrogate, character {error.start + 1}") from None


def parse_line(line: bytes, json_key: str) -> tuple[str, bytes]:
    """The text of one line, and its UTF-8.

    Raises:
        BadLine: the line holds no text under `json_key`.
    """
    record = parse_record(line)
    if json_key not in record:
        raise BadLine("missing key", f"no {json_key!r} among {sorted(record)[:8]}")
    text = record[json_key]
    if not isinstance(text, str):
        raise BadLine("not a string", f"{json_key!r} is a {type(text).__name__}")
    if not text or text.isspace():
        raise BadLine("empty text", f"{json_key!r} is empty or blank")
    return text, utf8(text)


class _Decompressor(io.RawIOBase):
    """Decompressed bytes of gzip or zstd: concatenated members as one, early ends refused."""

    def __init__(self, source: BinaryIO, file: JsonlFile) -> None:
        self._source, self._file = source, file
        self._member: Any = None  # the decompressor of the member that is being read
        self._pending, self._input = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            self._input = self._input or self._source.read(1 << 16)
            if not self._input:
                if self._member is not None:
                    raise self._damaged("it ends in the middle of a compressed block")
                return 0
            if self._member is None:
                self._member = self._new_member()
            try:
                self._pending = self._member.decompress(self._input)
            except Exception as error:  # zlib.error or zstandard.ZstdError
                raise self._damaged(str(error)) from error
            self._input = self._member.unused_data if self._member.eof else b""
            if self._member.eof:
                self._member = None
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _new_member(self) -> Any:
        if self._file.compression == "gzip":
            return zlib.decompressobj(wbits=31)
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self._file.path} is damaged near stored byte {self._source.tell()}: {why}",
            "fetch the file again",
        )


def _find(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and _SUFFIX.search(p.name))
        if not found:
            raise UserError(
                f"directory {path} holds no .jsonl, .jsonl.gz or .jsonl.zst file",
                "give a glob if they are called otherwise",
            )
        return found
    found = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    found = [p for p in found if p.is_file()]
    if not found:
        raise UserError(f"input {pattern} does not exist and matches no file")
    return found


def _inspect(path: Path) -> JsonlFile:
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror}") from error
    other = next((name for magic, name in _OTHER_MAGIC.items() if head.startswith(magic)), "")
    if other or path.suffix in _OTHER_SUFFIXES:
        raise UserError(
            f"input {path}: {other or path.suffix} is no compression that is read here",
            "recompress it with gzip or zstd, or unpack it",
        )
    # By content, not by name: a gzip that is called .jsonl is still a gzip.
    compression: Compression = "none"
    if head.startswith(b"\x1f\x8b"):
        compression = "gzip"
    elif head.startswith(b"\x28\xb5\x2f\xfd") or head[1:4] == b"\x2a\x4d\x18":
        compression = "zstd"  # a zstd frame, or the skippable frame that some writers begin with
    elif head and path.suffix in (".gz", ".zst"):
        raise UserError(f"input {path} is called {path.suffix} but is not compressed so")
    status = path.stat()
    return JsonlFile(path, compression, status.st_size, status.st_mtime_ns)

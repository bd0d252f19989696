"""The folder of private keys: made once, read when something is signed, rotated without a moment of two truths.

    root1.pem root2.pem root3.pem targets.pem              offline: bring them in, sign, take them away
    snapshot.pem timestamp.pem pipeline-<family>.pem       online: the publisher signs with them unattended
    director.pem                                           online: signs `desired` and commands
    public.json                                            names, key ids and public keys of all of them

PKCS8, Ed25519, mode 0600, encrypted when a passphrase is given. A rotation first writes `<name>.next.pem`, then
the repository is signed for it, then it takes the place of the old one (`compressor.publish`); it can be run again
after an interruption at any point. Leaves to others: what is signed with which key.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from agent.contract.artifact import canonical
from agent.contract.errors import ConfigError
from agent.contract.repository import pipeline_role
from agent.contract.signed import key_id, public_bytes
from agent.contract.topics import check_identifier
from compressor.files import storage_error, write_file

ROOTS = ("root1", "root2", "root3")
OFFLINE = (*ROOTS, "targets")
ONLINE = ("snapshot", "timestamp", "director")
PUBLIC = "public.json"
MAX_PEM_BYTES = 64 * 1024


class KeyRing:
    """All keys of one fleet. A missing private key is an error only when something has to be signed with it."""

    def __init__(self, folder: Path, *, passphrase: bytes | None = None) -> None:
        """Open an existing folder. Raises: ConfigError."""
        self.folder = folder
        self._passphrase = passphrase
        self._public = _read_public(folder / PUBLIC)

    @classmethod
    def create(cls, folder: Path, families: Iterable[str], *, passphrase: bytes | None = None) -> KeyRing:
        """Make every key.

        Raises:
            ConfigError: the folder already holds keys.
            ContractError: a family's name cannot be one.
            DiskFull, StorageError
        """
        names = [*OFFLINE, *ONLINE, *(pipeline_role(check_identifier(family)) for family in families)]
        if (folder / PUBLIC).exists():
            raise ConfigError(
                f"{folder} already holds keys", hint="Use `keys rotate` to replace one; never make them anew."
            )
        _make_folder(folder)
        # files of an interrupted run are replaced: public.json, written last, makes them count
        keys = {name: _write_private(folder / f"{name}.pem", passphrase) for name in names}
        _write_public(folder, keys)
        return cls(folder, passphrase=passphrase)

    def reload(self) -> None:
        """Read the list of public keys again: another process may have rotated one. Raises: ConfigError."""
        self._public = _read_public(self.folder / PUBLIC)

    def add_family(self, family: str) -> None:
        """Make the pipeline key of one more family; an existing one is kept. Raises: ContractError, StorageError."""
        name = pipeline_role(check_identifier(family))
        if name not in self._public:
            self._list(name, _write_private(self.folder / f"{name}.pem", self._passphrase))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._public))

    @property
    def families(self) -> tuple[str, ...]:
        prefix = pipeline_role("")
        return tuple(name.removeprefix(prefix) for name in self.names if name.startswith(prefix))

    def public(self, name: str) -> bytes:
        """The raw public key; needs no private file. Raises: ConfigError."""
        if name not in self._public:
            raise ConfigError(f"{self.folder} holds no key '{name}'", hint=f"It holds {', '.join(self.names)}.")
        return self._public[name]

    def private(self, name: str) -> Ed25519PrivateKey:
        """The private key. Raises: ConfigError: missing, readable by others, wrong passphrase, or not Ed25519."""
        self.public(name)
        return _read_private(self.folder / f"{name}.pem", self._passphrase)

    def held(self, name: str) -> list[Ed25519PrivateKey]:
        """The current key and the one that is to replace it, as far as their files are here. Raises: ConfigError."""
        paths = (self.folder / f"{name}.pem", self._next(name))
        return [_read_private(path, self._passphrase) for path in paths if path.exists()]

    def is_rotating(self, name: str) -> bool:
        """A rotation of this key was begun and not finished."""
        return self._next(name).exists()

    def prepare(self, name: str) -> Ed25519PrivateKey:
        """The key that will replace `name`: made now, or left from an unfinished rotation. Raises: ConfigError."""
        self.public(name)
        if not self._next(name).exists():
            _write_private(self._next(name), self._passphrase)
        return _read_private(self._next(name), self._passphrase)

    def promote(self, name: str) -> None:
        """The prepared key takes the place of the old one, which is gone then. Raises: ConfigError, StorageError."""
        new = _read_private(self._next(name), self._passphrase)
        self._list(name, public_bytes(new))  # before the rename: what the repository names already is never unknown
        try:
            self._next(name).replace(self.folder / f"{name}.pem")
        except OSError as error:
            raise storage_error(error, self._next(name)) from error

    def _next(self, name: str) -> Path:
        return self.folder / f"{name}.next.pem"

    def _list(self, name: str, public: bytes) -> None:
        _write_public(self.folder, {**self._public, name: public})
        self._public = _read_public(self.folder / PUBLIC)


def read_passphrase(path: Path | None) -> bytes | None:
    """The passphrase in a file, without the newline at its end. Raises: ConfigError."""
    if path is None:
        return None
    try:
        passphrase = path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"cannot read the passphrase in {path}: {error.strerror}") from None
    if not passphrase:
        raise ConfigError(f"the passphrase file {path} is empty")
    return passphrase


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise storage_error(error, folder) from error


def _write_private(path: Path, passphrase: bytes | None) -> bytes:
    """Make a key and return its public half."""
    encryption: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    private = Ed25519PrivateKey.generate()
    mask = os.umask(0o077)  # never readable by others, not even for a moment
    try:
        write_file(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    finally:
        os.umask(mask)
    return public_bytes(private)


def _read_private(path: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    try:
        status = path.stat()
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"the key {path} can be used by others", hint=f"Run: chmod 600 {path}")
        if status.st_size > MAX_PEM_BYTES:
            raise ConfigError(f"{path} is too large for a key")
        key = load_pem_private_key(path.read_bytes(), passphrase)
    except OSError as error:
        raise ConfigError(
            f"cannot read the key {path}: {error.strerror}",
            hint="Offline keys have to be brought into the folder to sign with them.",
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot open the key {path}: {error}", hint="Check the passphrase file.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key")
    return key


def _write_public(folder: Path, keys: dict[str, bytes]) -> None:
    entries = {name: {"keyid": key_id(public), "public": public.hex()} for name, public in keys.items()}
    write_file(folder / PUBLIC, canonical({"format": 1, "keys": entries}))


def _read_public(path: Path) -> dict[str, bytes]:
    try:
        document = json.loads(path.read_bytes())
        keys = {str(name): bytes.fromhex(entry["public"]) for name, entry in document["keys"].items()}
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="Run `edgewarden-compressor keys init --keys DIR` first."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not a list of public keys") from None
    return keys

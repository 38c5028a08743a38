"""A SQLite file of our own: opened, checked, written in whole steps; errors that say what to do.

WAL, the log written ahead: readers and one writer do not wait for each other, and whoever is
killed at any instruction leaves either the whole transaction or nothing of it. It needs memory that
the processes share, hence a disk of this machine, not a network drive.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from errata.errors import StorageError

APPLICATION = int.from_bytes(b"erra")
"""In a file's `application_id`: tells our databases from other programs'."""

BUSY_SECONDS = 60.0
"""How long one process waits while another writes."""


def open_database(
    path: Path, tables: str, version: int, *, read_only: bool = False
) -> sqlite3.Connection:
    """Open a database of these tables; it is made if it is not there.

    Args:
        path: the file; its folder exists.
        tables: CREATE statements, each ended by a semicolon.
        version: of the tables; another one is refused.
        read_only: change nothing. In a folder that cannot be written, this is the only way.

    Raises:
        StorageError: it cannot be opened, is not ours, is of another version, or, to be read
            only, is not there.
    """
    with explained(path, "it cannot be opened"):
        db = _connected_to_read(path) if read_only else _connected(path, "mode=rwc")
        try:
            if not _has_tables(db, path, version):
                if read_only:
                    raise StorageError(f"{path} is empty: nothing was ever finished there.")
                _make(db, path, tables, version)
            if not read_only:
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("BEGIN IMMEDIATE")  # finds out now whether it can be written
                db.execute("ROLLBACK")
        except BaseException:
            db.close()
            raise
    return db


@contextmanager
def reading(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """What is read inside is of one moment.

    Raises:
        StorageError: the file cannot be read.
    """
    with explained(path, "it cannot be read"):
        db.execute("BEGIN")
        try:
            yield
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")


@contextmanager
def writing(
    db: sqlite3.Connection, path: Path, lost: str, *, durable: bool = False
) -> Iterator[None]:
    """What is written inside is there whole after the block, or not at all.

    Args:
        db: the connection.
        path: its file.
        lost: what did not happen if this fails, for the message.
        durable: leave the block only when the disk has it, so that a power cut cannot take it.

    Raises:
        StorageError: the file cannot be written; it is as it was before.
    """
    with explained(path, lost):
        db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk may have ended it already
                db.execute("ROLLBACK")
            raise


@contextmanager
def explained(path: Path, lost: str) -> Iterator[None]:
    """Errors of SQLite as ours: what is wrong, what is safe, what to do."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # ours to mend
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        advice = next((text for start, text in _ADVICE.items() if name.startswith(start)), "")
        raise StorageError(f"{path}: {lost}: {error}. {advice}".rstrip()) from error


_ADVICE = {
    "SQLITE_FULL": "Everything finished before is safe. Free space and run the study again: it "
    "goes on where it stopped.",
    "SQLITE_IOERR": "Everything finished before is safe. See whether the disk is full or failing, "
    "or a network drive, and run the study again.",
    "SQLITE_READONLY": "Give yourself the right to write the file and its folder, or name another "
    "place for the results.",
    "SQLITE_CANTOPEN": "Give yourself the right to write the file and its folder, or name another "
    "place for the results.",
    "SQLITE_BUSY": f"Another process has been writing for {BUSY_SECONDS:.0f} seconds; run the "
    "study again when it is done.",
    "SQLITE_NOTADB": "It is another kind of file; name another place for the results.",
    "SQLITE_CORRUPT": "The file was damaged; `sqlite3 FILE .recover` may save what it holds. Move "
    "it away and run the study again.",
}


def _connected(path: Path, way: str) -> sqlite3.Connection:
    """A connection that has read the file once: it is a database, and can be read this way."""
    uri = f"{path.as_uri()}?{way}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("SELECT count(*) FROM sqlite_master")
    except BaseException:
        db.close()
        raise
    return db


def _connected_to_read(path: Path) -> sqlite3.Connection:
    """With the rights there are: even a reader of a log writes beside it, where it can."""
    if not path.is_file():
        raise StorageError(f"there is no file {path}. Run the study first.")
    with suppress(sqlite3.OperationalError):
        db = _connected(path, "mode=rw")
        db.execute("PRAGMA query_only = ON")
        return db
    if path.with_name(f"{path.name}-wal").exists():
        return _connected(path, "mode=ro")
    return _connected(path, "mode=ro&immutable=1")


def _has_tables(db: sqlite3.Connection, path: Path, version: int) -> bool:
    """Whether these are our tables; False if there are none at all."""
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        return False
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION:
        raise StorageError(
            f"{path} is a database of another program; name another place for the results."
        )
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found != version:
        raise StorageError(
            f"{path} has version {found} of the results' tables, and this errata reads version "
            f"{version}: use the errata that wrote it, or name another place for the results."
        )
    return True


def _make(db: sqlite3.Connection, path: Path, tables: str, version: int) -> None:
    """Make the tables; another process may be doing the same."""
    _write_ahead(db)
    db.execute("BEGIN IMMEDIATE")
    try:
        if not _has_tables(db, path, version):
            for statement in tables.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _write_ahead(db: sqlite3.Connection) -> None:
    """Turn the log on. Where two processes do so at once, SQLite does not wait but refuses one."""
    for _ in range(100):
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            time.sleep(0.05)
    raise sqlite3.OperationalError("database is locked")

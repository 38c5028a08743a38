"""The results of a study: one SQLite database, one row for each finished unit of work.

What is finished is never lost and never computed twice:

- *A row is there whole, or not at all.* A unit's row, its cases and its stream's points are one
  transaction. The log is written ahead (WAL): whoever is killed, at any instruction, leaves a
  database that opens and holds every row that `put` has returned from. For a killed process the
  system's own buffers would do; `put` also waits for the disk (`synchronous=FULL`), so that a
  power cut takes no row either. Claims may be lost: they commit without waiting (`NORMAL`).
- *A key has one row.* The first finished row of a key stands; later ones are ignored. A failed
  row gives way to any other.
- *Several processes may work on one study.* Each claims a unit before it computes it. A claim
  says who holds it and when that process was last alive (a thread writes this down); claims
  of processes that are gone are taken over.
- *Studies share their rows.* A key does not know its study. `$ERRATA_CACHE/studies` lists the
  databases of this user, and `adopt` copies from them what another study has finished. A database
  that is deleted takes its rows with it: what nobody has any more is computed again.

WAL needs memory that its processes share: the database belongs on a disk of the machine, not on a
network drive.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from errata.errors import StorageError
from errata.jobs.files import make_folder
from errata.jobs.studies.database import open_database, reading, writing
from errata.jobs.studies.export import Table, export_rows
from errata.jobs.studies.host import is_running, process_name
from errata.jobs.studies.rows import Row, Status, chosen, order, to_json
from errata.jobs.studies.siblings import enlist, siblings
from errata.measure.metrics import Estimate

__all__ = ["Row", "Status", "Store"]

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the tables below; in the database's `user_version`."""

TABLES = """
CREATE TABLE results (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    study TEXT NOT NULL,
    unit TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    metrics TEXT NOT NULL,
    record TEXT NOT NULL,
    error TEXT NOT NULL,
    seconds REAL NOT NULL,
    created TEXT NOT NULL
);
CREATE TABLE cases (
    result INTEGER NOT NULL REFERENCES results (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    content TEXT NOT NULL,
    PRIMARY KEY (result, position)
) WITHOUT ROWID;
CREATE TABLE points (
    result INTEGER NOT NULL REFERENCES results (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    content TEXT NOT NULL,
    PRIMARY KEY (result, position)
) WITHOUT ROWID;
CREATE TABLE claims (
    key TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    beat REAL NOT NULL
) WITHOUT ROWID;
"""

COLUMNS = "key, study, unit, status, metrics, record, error, seconds, created"


class Store:
    """A study's database, open; use it in a `with` block and in the thread that made it.

    Args:
        path: the database; made with its folder if it is not there.
        read_only: change nothing, not even to make it; what is not there is an error.
        stale_after: seconds without a sign of life after which a claim counts for nothing.

    Raises:
        StorageError: it cannot be opened or written, is no database of errata, or is one of
            another version.
    """

    def __init__(
        self, path: Path | str, *, read_only: bool = False, stale_after: float = 60.0
    ) -> None:
        self.path = Path(path).absolute()
        self.owner = f"{process_name()}:{uuid.uuid4().hex[:8]}"
        self._stale_after = stale_after
        self._closing = threading.Event()
        self._heart: threading.Thread | None = None
        if not read_only:
            make_folder(self.path.parent)
        self._db = open_database(self.path, TABLES, VERSION, read_only=read_only)
        if not read_only:
            enlist(self.path)

    def put(self, row: Row) -> bool:
        """Keep a row, with its cases and points, for good; its claim is let go.

        Returns:
            Whether it is kept: a key that is done already stays as it is.

        Raises:
            StorageError: it cannot be written; the rows before it are safe.
            TypeError: something in it has no form in JSON.
        """
        with self._writing(f"the result of unit {row.key[:12]} is not kept", durable=True):
            kept = self._insert(row)
            self._db.execute("DELETE FROM claims WHERE key = ?", (row.key,))
        return kept

    def claim(self, key: str) -> bool:
        """Take a unit, so that no other process computes it; False if it is done or taken.

        A failed unit can be claimed again. `put` and `release` let go of the claim, `close` of
        all. A claim whose process is gone counts for nothing: at once if it ran on this host, else
        when it has given no sign of life for `stale_after` seconds.

        Raises:
            StorageError: the database cannot be written.
        """
        with self._writing("no unit can be claimed"):
            if self._status(key) == "done":
                return False
            now = time.time()
            held = self._db.execute("SELECT owner, beat FROM claims WHERE key = ?", (key,))
            for owner, beat in held:
                if now - beat <= self._stale_after and is_running(owner):
                    return False
                logger.warning("unit %s is taken over from %s, which is gone.", key[:12], owner)
            self._db.execute("REPLACE INTO claims VALUES (?, ?, ?)", (key, self.owner, now))
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._heart.start()
        return True

    def release(self, key: str) -> None:
        """Let go of a claim of this store; others' stay.

        Raises:
            StorageError: the database cannot be written.
        """
        with self._writing("a claim is not released"):
            self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self.owner))

    def rename(self, key: str, study: str, unit: Mapping[str, Any]) -> None:
        """Call a row's study and unit as they are called now: names are no part of a key.

        Raises:
            StorageError: the database cannot be written.
        """
        with self._writing(f"unit {key[:12]} keeps its old name"):
            self._db.execute(
                "UPDATE results SET study = ?1, unit = ?2 "
                "WHERE key = ?3 AND (study != ?1 OR unit != ?2)",
                (study, to_json(unit), key),
            )

    def claims(self) -> dict[str, str]:
        """Who is at work: key -> owner, "host:pid:store"; claims of the dead included."""
        with self._reading():
            return dict(self._db.execute("SELECT key, owner FROM claims ORDER BY key"))

    def statuses(self) -> dict[str, Status]:
        """Every key that has a row, done or failed."""
        with self._reading():
            return dict(self._db.execute("SELECT key, status FROM results ORDER BY key"))

    def get(self, key: str) -> Row | None:
        """The whole row of a key, or None."""
        with self._reading():
            sql = f"SELECT id, {COLUMNS} FROM results WHERE key = ?"
            for number, *values in self._db.execute(sql, (key,)):
                cases, points = self._contents("cases", number), self._contents("points", number)
                row = _row(values)
                return replace(row, cases=cases.get(number, ()), points=points.get(number, ()))
        return None

    def cases(self, key: str) -> tuple[Mapping[str, Any], ...]:
        """The cases of a key; none if it has no row."""
        row = self.get(key)
        return () if row is None else row.cases

    def rows(
        self,
        *,
        study: str | None = None,
        status: Status | None = None,
        keys: Collection[str] | None = None,
        where: Mapping[str, Any] | None = None,
        cases: bool = False,
    ) -> list[Row]:
        """The rows, in an order that does not depend on when each was computed.

        Args:
            study: only rows of this study.
            status: only "done" or only "failed" ones.
            keys: only rows of these units.
            where: only rows whose unit has these values, by field; nested fields by dotted names
                such as "settings.target.clamp".
            cases: with their cases, which are many; without them `Row.cases` is empty.

        Raises:
            ConfigError: no unit has a field that `where` names.
            StorageError: the database cannot be read.
        """
        with self._reading():
            found = {
                number: _row(values)
                for number, *values in self._db.execute(f"SELECT id, {COLUMNS} FROM results")
            }
            points = self._contents("points")
            asked = self._contents("cases") if cases else {}
        rows = [
            replace(row, points=points.get(number, ()), cases=asked.get(number, ()))
            for number, row in found.items()
        ]
        rows = [
            row
            for row in rows
            if study in (None, row.study)
            and status in (None, row.status)
            and (keys is None or row.key in keys)
        ]
        return sorted(chosen(rows, where or {}), key=order)

    def adopt(self, keys: Iterable[str], study: str) -> list[str]:
        """Copy what other studies of this user have finished, instead of computing it again.

        Args:
            keys: the units that are wanted; those that are done here are left alone.
            study: the name under which the rows are kept; their record's `adopted_from` names the
                study that computed them.

        Returns:
            The keys that were copied.

        Raises:
            StorageError: the database cannot be written.
        """
        done = {key for key, status in self.statuses().items() if status == "done"}
        wanted = set(keys) - done
        adopted: list[str] = []
        for path in siblings(self.path) if wanted else ():
            found = _finished(path, wanted)
            wanted -= {row.key for row in found}
            with self._writing("no row of another study is adopted", durable=True):
                for row in found:
                    record = {"adopted_from": row.study, **row.record}
                    if self._insert(replace(row, study=study, record=record)):
                        adopted.append(row.key)
        return sorted(adopted)

    def export(self, path: Path | str, *, table: Table = "units") -> Path:
        """Write all rows to a file, whole or not at all; see `export_rows`.

        Raises:
            ConfigError: the suffix is none of .jsonl, .csv, .parquet, or a library is missing.
            StorageError: the file cannot be written.
        """
        return export_rows(self.rows(cases=True), path, table=table)

    def close(self) -> None:
        """Let go of all claims of this store and close the database."""
        self._closing.set()
        try:
            if self._heart is not None:
                self._heart.join()
                self._heart = None
                with self._writing("claims are not released, but will soon count for nothing"):
                    self._db.execute("DELETE FROM claims WHERE owner = ?", (self.owner,))
        except StorageError as error:
            logger.warning("%s", error)
        finally:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _status(self, key: str) -> Status | None:
        found = self._db.execute("SELECT status FROM results WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    def _insert(self, row: Row) -> bool:
        """Inside a transaction: the row, unless its key is done."""
        if self._status(row.key) == "done":
            return False
        self._db.execute("DELETE FROM results WHERE key = ?", (row.key,))
        number = self._db.execute(
            f"INSERT INTO results ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.key,
                row.study,
                to_json(row.unit),
                row.status,
                to_json(row.metrics),
                to_json(row.record),
                row.error.encode("utf-8", "backslashreplace").decode(),
                row.seconds,
                row.created,
            ),
        ).lastrowid
        for table, contents in (("cases", row.cases), ("points", row.points)):
            self._db.executemany(
                f"INSERT INTO {table} VALUES (?, ?, ?)",
                ((number, position, to_json(one)) for position, one in enumerate(contents)),
            )
        return True

    def _contents(self, table: str, result: int | None = None) -> dict[int, tuple[Any, ...]]:
        """The cases or points of one result, or of all, by its number."""
        only = "" if result is None else f"WHERE result = {result}"
        found: dict[int, list[Any]] = {}
        for number, content in self._db.execute(
            f"SELECT result, content FROM {table} {only} ORDER BY result, position"
        ):
            found.setdefault(number, []).append(json.loads(content))
        return {number: tuple(contents) for number, contents in found.items()}

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._db, self.path)

    def _writing(self, lost: str, *, durable: bool = False) -> AbstractContextManager[None]:
        return writing(self._db, self.path, lost, durable=durable)

    def _beat(self) -> None:
        """In a thread: say that this store's claims are alive, until it is closed."""
        while not self._closing.wait(self._stale_after / 4):
            try:
                with (
                    closing(open_database(self.path, TABLES, VERSION)) as db,
                    writing(db, self.path, "claims may be taken over"),
                ):
                    beat = (time.time(), self.owner)
                    db.execute("UPDATE claims SET beat = ? WHERE owner = ?", beat)
            except StorageError as error:
                logger.warning("%s", error)


def _row(values: Sequence[Any]) -> Row:
    """A row without cases and points, from its COLUMNS."""
    key, study, unit, status, metrics, record, error, seconds, created = values
    return Row(
        key=key,
        study=study,
        unit=json.loads(unit),
        status=status,
        metrics={name: Estimate(*four) for name, four in json.loads(metrics).items()},
        record=json.loads(record),
        error=error,
        seconds=seconds,
        created=created,
    )


def _finished(path: Path, keys: Iterable[str]) -> list[Row]:
    """Finished rows of another study; none from a database that cannot be read."""
    try:
        with Store(path, read_only=True) as other:
            found = (other.get(key) for key in sorted(keys))
            return [row for row in found if row is not None and row.status == "done"]
    except StorageError as error:
        logger.warning("its results are not shared: %s", error)
        return []

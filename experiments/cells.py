"""Independent runs, a worker process for each core, none of them twice.

A cell is the arguments of one run. Its result is kept in the experiment's JSON beside the arguments it came from: who
starts an experiment again pays only for the cells that are new or have changed. (A changed program is not noticed:
delete the file.)
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

Cell = dict[str, Any]  # arguments or results, as JSON holds them


def run_cells(
    function: Callable[..., Cell], cells: dict[str, Cell], path: Path, *, workers: int, keep_others: bool = False
) -> dict[str, Cell]:
    """`function(**arguments)` for each cell whose result is not in the file at `path` yet.

    Args:
        function: of a module; what it returns can be written as JSON, and follows from its arguments.
        cells: arguments, by the cell's name.
        path: of the JSON; written anew after each cell.
        workers: processes with one thread each; 0 is this one.
        keep_others: the file's cells that are not asked for stay in it.

    Returns:
        The results, by name, in the order of `cells`.
    """
    cells = json.loads(json.dumps(cells))  # as it will be read again
    before = json.loads(path.read_text())["cells"] if path.exists() else {}
    done = {name: before[name] for name in cells if name in before and before[name]["given"] == cells[name]}
    missing = {name: given for name, given in cells.items() if name not in done}
    others = {name: cell for name, cell in before.items() if name not in cells} if keep_others else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, dict(cells=done | others))
    for name, result in _each(function, missing, workers):
        done[name] = dict(given=cells[name], result=json.loads(json.dumps(result)))  # as it will be read again
        _write(path, dict(cells={name: done[name] for name in cells if name in done} | others))
        print(f"{len(done)}/{len(cells)}  {name}", file=sys.stderr, flush=True)
    return {name: done[name]["result"] for name in cells}


def add_facts(path: Path, facts: Cell) -> None:
    """Put what is known of all cells together before them."""
    _write(path, {**facts, "cells": json.loads(path.read_text())["cells"]})


def _each(function: Callable[..., Cell], cells: dict[str, Cell], workers: int):
    """(name, result) of each, as they come."""
    if workers == 0:
        for name, given in cells.items():
            yield name, function(**given)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_thread) as pool:
        futures = {pool.submit(function, **given): name for name, given in cells.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _one_thread() -> None:
    torch.set_num_threads(1)


def _write(path: Path, content: Cell) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)

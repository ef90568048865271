"""Trajectories on the workers of a Ray cluster, a local one or one that exists (Moritz et al., 2018, arXiv:1712.05889).

Every worker is an actor that loads the model once. Trajectories come first, all workers at once; then what is timed, on
nodes that nothing else runs on. Results come back one by one: the driver alone writes the journal.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pruning_comparison.environment import PASSIVE, WAIT_POLICY, let_threads_sleep
from pruning_comparison.errors import ClusterError, InputError
from pruning_comparison.formatting import reason_of
from pruning_comparison.models import preview_model
from pruning_comparison.run.attempts import Failure, attempt, attempt_rebuild, attempt_timing, failure_of
from pruning_comparison.run.inputs import Inputs
from pruning_comparison.run.launchers.work import (
    LAYER_TIMES,
    Begun,
    Event,
    LayersTimed,
    Timed,
    TimingKey,
    Trouble,
    Work,
    format_timing,
    timed_event,
)
from pruning_comparison.run.measure_cell import untimed
from pruning_comparison.run.provenance import hardware, versions
from pruning_comparison.run.pruned_model import KeptHeads, PrunedModel
from pruning_comparison.run.saved_models import model_folder, save_model
from pruning_comparison.run.workspace import Workspace, load_workspace, negotiation_rules
from pruning_comparison.spec import Cell, ComparisonSpec, available_cores
from pruning_comparison.store.records import CellResult
from pruning_comparison.store.run_folder import MANIFEST
from pruning_comparison.variants import variant_named

LOGGER = logging.getLogger(__name__)

MOST_DEATHS = 3
"""A trajectory whose worker has died so often is given up: its cells are recorded as failed. So is a local cluster."""

_LISTEN_S = 5.0
_ASK_AGAIN_S = 1.0

_NO_CLUSTER = "--ray_address: no cluster answers at {}"
_STORE_BYTES = 512 * 1024**2
"""What passes between driver and workers of a local cluster is small: texts, and results of single cells."""

TrajectoryKey = tuple[str, str, int]
"""(rules of negotiation or variant, method, iteration): trajectories that share one share their rounds as well."""


@dataclass(frozen=True)
class Task:
    """Cells for one worker: those of one trajectory, or of several that share their rounds."""

    path: TrajectoryKey
    cells: tuple[Cell, ...]


class Worker:
    """One process of a cluster, with the model in its memory."""

    def __init__(self, spec: ComparisonSpec, work: Mapping[str, Any]) -> None:
        self._spec = spec
        self._work = work
        self._workspace: Workspace | None = None

    def start(self) -> dict[str, Any]:
        """Checks that this node would measure the same as the driver, loads the model, and says what machine this is."""
        node = f"node {_node_address()}"
        if (here := versions()) != self._work["versions"]:
            other = ", ".join(f"{k} {v}" for k, v in here.items() if self._work["versions"].get(k) != v)
            raise ClusterError(
                f"{node} has {other}, unlike the driver: results would differ. Install the same versions."
            )
        preview = preview_model(self._spec.model_name)
        if preview.identity() != self._work["model"]:
            raise ClusterError(
                f"{node} has another {self._spec.model_name} than the driver. Copy the same files there."
            )
        inputs = Inputs(preview, *self._work["inputs"])
        folder = self._work["folder"]
        # A worker that the folder is not shared with keeps no training that is under way.
        shared = folder if (folder / MANIFEST).is_file() else None
        self._workspace = load_workspace(self._spec, inputs, shared, layer_times_s=self._work["layer_times_s"])
        return hardware(self._spec)

    def layer_times_s(self) -> Mapping[int, float]:
        """Seconds of a decoding step per layer, by the layer's live heads."""
        return dict(self._loaded().layer_times_s())

    def measure(self, cells: Sequence[Cell], parts: Mapping[Cell, KeptHeads]) -> Iterator[CellResult | Trouble]:
        """The results of cells that share a path, one by one; of those in ``parts`` only what is missing."""
        for cell in cells:
            part = parts.get(cell)
            pruned, result = attempt(self._loaded(), cell, part, raise_failures=self._work["raise_failures"])
            yield result
            if pruned is not None and cell in self._work["models"]:
                yield from self._save(pruned, cell)

    def save(self, cell: Cell, known: KeptHeads) -> Sequence[Trouble]:
        """Makes a model again that has been measured, and saves it."""
        pruned, failure = self._rebuilt(cell, known)
        return list(self._save(pruned, cell)) if pruned is not None else [_trouble(cell, failure)]

    def time(self, level: TimingKey, known: Mapping[str, KeptHeads]) -> tuple[Timed, Sequence[Trouble]]:
        """Makes the models of all variants at one level again, as they were measured, and times them in turns."""
        method, iteration, at = level
        models, trouble = {}, []
        for variant, kept in known.items():
            cell = Cell(variant, method, iteration, at)
            pruned, failure = self._rebuilt(cell, kept)
            if pruned is not None:
                models[variant] = pruned.model
            else:
                trouble.append(_trouble(cell, failure))
        if not models:
            return Timed(level, (), complete=False), trouble
        timings, failed = attempt_timing(self._loaded(), models, iteration, raise_failures=self._work["raise_failures"])
        return timed_event(level, timings, failed, all_there=set(models) == set(self._spec.variants)), trouble

    def _loaded(self) -> Workspace:
        if self._workspace is None:
            raise RuntimeError("a worker is used before it has started")
        return self._workspace

    def _rebuilt(self, cell: Cell, known: KeptHeads) -> tuple[PrunedModel | None, Failure | None]:
        return attempt_rebuild(self._loaded(), cell, known, raise_failures=self._work["raise_failures"])

    def _save(self, pruned: PrunedModel, cell: Cell) -> Iterator[Trouble]:
        folder = self._work["folder"]
        try:
            if not (folder / MANIFEST).is_file():
                raise FileNotFoundError(f"{folder} is not on node {_node_address()}; models need a shared folder")
            save_model(self._loaded(), pruned, cell, folder)
        except Exception as error:
            if self._work["raise_failures"]:
                raise
            yield _trouble(cell, failure_of(error))


def _trouble(cell: Cell, failure: Failure | None) -> Trouble:
    known = failure or Failure("it could not be made again")
    return Trouble(cell.describe(), known.reason, known.traceback)


class RayLauncher:
    """Hands trajectories to workers of ``spec.threads`` cores, or one GPU, each.

    ``address`` is that of an existing cluster ("auto", or host:port of its head); without one a cluster is started on this
    machine, and stopped at the end. ``workers`` limits how many there are; else as many as there
    is room for and work for. InputError where Ray is not installed.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        *,
        worker: type[Worker] = Worker,
        node_timeout_s: float = 600.0,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--launcher=ray needs Ray: pip install 'pruning-comparison[ray]'") from None
        self._ray = ray
        self._address = address
        self._workers = workers
        self._worker = worker
        self._node_timeout_s = node_timeout_s

    def __call__(self, work: Work) -> Iterator[Event]:
        if not work:
            return
        if work.spec.device not in ("cpu", "cuda", "cuda:0"):
            raise InputError(
                f"--device: {work.spec.device} cannot be chosen with --launcher=ray, which gives every worker a GPU of its "
                "own. Give cuda."
            )
        with _pickled_by_value(self._ray, work.spec):
            yield from self._launch(work)

    def _launch(self, work: Work) -> Iterator[Event]:
        for clusters in range(1, MOST_DEATHS + 1):
            self._connect(work)
            try:
                for event in _Session(self._ray, self._worker, self._workers, self._node_timeout_s, work).run():
                    work = _without(work, event)
                    yield event
                return
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, Exception) else error from None
            except (self._ray.exceptions.RayError, OSError) as error:
                if self._address is not None or clusters == MOST_DEATHS:
                    raise ClusterError(
                        f"the cluster was lost: {reason_of(error)}. What was measured is kept; start the cluster again, and "
                        "the same command continues."
                    ) from error
                LOGGER.warning("the cluster was lost; a new one goes on with what is missing")
            finally:
                self._ray.shutdown()

    def _connect(self, work: Work) -> None:
        """Starts or joins a cluster. Ray's handler of SIGTERM is put aside for the one there was."""
        let_threads_sleep()  # in workers: a local cluster's inherit this environment
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers without a GPU keep the visible devices as they are, as later versions of Ray will do: else it warns.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray's own default of 15 would let anything else on the machine disturb what is timed.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray ends this whole process, without a word, once a head has not answered for so long: by default a minute,
        # which a busy machine needs. A lost head is noticed by asking it, see _check_head.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
        if self._address is None:
            cores = available_cores()
            if work.spec.threads > cores:
                raise InputError(
                    f"--threads: {work.spec.threads} is more than the {cores} cores there are. Give fewer."
                )
            options |= {"address": "local", "num_cpus": cores, "include_dashboard": False}
            options |= {"object_store_memory": _STORE_BYTES}
            LOGGER.info("starting a Ray cluster on this machine, %d cores", cores)
        else:
            # Workers of a cluster that runs already have its environment; this one is set before they load torch.
            waiting = {WAIT_POLICY: os.environ.get(WAIT_POLICY, PASSIVE)}
            options |= {"address": self._address, "runtime_env": {"env_vars": waiting}}
            LOGGER.info("joining the Ray cluster at %s", self._address)
            _check_reachable(self._address)
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, self._ray.exceptions.RayError) as error:
            raise ClusterError(
                f"{_NO_CLUSTER.format(self._address)}: {reason_of(error)}. Start one with ray start "
                "--head; if there is one, both sides may need RAY_AUTH_MODE=token, and the same token."
                if self._address is not None
                else f"the Ray cluster cannot be started: {reason_of(error)}. --launcher=serial needs none."
            ) from error
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


@dataclass
class _Running:
    """A task under way on a worker, and what of it has not come back yet."""

    worker: Any
    task: Task
    left: list[Cell]


class _Session:
    """One connection to a cluster."""

    def __init__(
        self, ray: Any, worker: type[Worker], most_workers: int | None, node_timeout_s: float, work: Work
    ) -> None:
        self._ray = ray
        self._worker = ray.remote(worker)
        self._most_workers = most_workers
        self._node_timeout_s = node_timeout_s
        self._work = work
        self._head = str(ray.get_runtime_context().gcs_address)
        inputs = work.inputs
        self._told: dict[str, Any] = {
            "versions": versions(),
            "model": inputs.digests["model"],
            "inputs": (
                inputs.prompts,
                inputs.prompt_ids,
                inputs.windows,
                inputs.calibration,
                inputs.digests,
                inputs.bos,
            ),
            "folder": work.folder.resolve(),
            "models": work.models,
            "raise_failures": work.raise_failures,
            "layer_times_s": work.layer_times_s,
        }
        self._shared = ray.put(self._told)

    def run(self) -> Iterator[Event]:
        """Cells first; then what has been measured before and is to be saved; then timings, which need a node alone.

        Layer times, which need a node alone as well, come before the cells whose heads are chosen by them.
        """
        if self._work.lacks_layer_times:
            yield from self._time_layers()
        yield from self._measure()
        yield from self._save()
        yield from self._time()

    def _first(self, waited_for: Sequence[Any]) -> Any:
        """Whatever is ready first. ConnectionError where the cluster's head is gone."""
        while True:
            ready, _ = self._ray.wait(list(waited_for), num_returns=1, timeout=_LISTEN_S)
            if ready:
                return ready[0]
            self._check_head()

    def _check_head(self) -> None:
        """ConnectionError where the cluster's head is gone: what Ray itself asks of a lost head waits for many minutes."""
        try:
            _check_reachable(self._head)
        except ClusterError:
            time.sleep(_ASK_AGAIN_S)
            try:
                _check_reachable(self._head)
            except ClusterError as error:
                raise ConnectionError("its head does not answer") from error

    # Layer times

    def _time_layers(self) -> Iterator[Event]:
        """The layer times of the run, which every worker is then told. ClusterError where no node is free for them."""
        yield Begun(LAYER_TIMES)
        owners = self._owners()
        if not owners:
            raise ClusterError(
                f"no node was free of other work within {self._node_timeout_s:.0f} s, and --consent=time needs layer times "
                "that are measured alone. Wait until one is free; then the same command continues."
            )
        found = self._ray.get(self._first([owners[0].layer_times_s.remote()]))
        self._end(owners)
        self._shared = self._ray.put({**self._told, "layer_times_s": found})
        yield LayersTimed(found)

    # Cells

    def _measure(self) -> Iterator[Event]:
        """All cells, by trajectories. A worker that dies is replaced, and what was left of its trajectory goes on."""
        waiting = tasks_of(self._work.spec, self._work.cells)
        if not waiting:
            return
        count = min(len(waiting), self._room(), self._most_workers or len(waiting))
        LOGGER.info("%d trajectories for %d worker%s", len(waiting), count, "s" if count > 1 else "")
        deaths: Counter[TrajectoryKey] = Counter()
        dead_at_start = 0
        idle: list[Any] = []
        starting: dict[Any, Any] = {}
        running: dict[Any, _Running] = {}
        while waiting or running:
            while idle and waiting:
                task = waiting.pop(0)
                worker = idle.pop()
                parts = {cell: self._work.known(cell) for cell in task.cells if cell in self._work.parts}
                results = worker.measure.options(num_returns="streaming").remote(task.cells, parts)
                running[results] = _Running(worker, task, list(task.cells))
                yield Begun(task.cells[0].describe())
            while waiting and len(starting) + len(running) < count:
                worker = self._new_worker()
                starting[worker.start.remote()] = worker
            ready = self._first([*running, *starting])
            if ready in starting:
                worker = starting.pop(ready)
                try:
                    self._ray.get(ready)
                except self._deaths() as error:
                    dead_at_start += 1
                    if dead_at_start >= MOST_DEATHS:
                        raise ClusterError(f"workers die while they load the model: {reason_of(error)}") from error
                else:
                    idle.append(worker)
                continue
            now = running[ready]
            try:
                result = self._ray.get(next(ready))
            except StopIteration:
                idle.append(running.pop(ready).worker)
            except self._deaths() as error:
                self._check_head()  # workers die with their cluster
                del running[ready]
                yield from self._bury(now, error, deaths, waiting)
            else:
                yield result
                if isinstance(result, CellResult):
                    now.left.remove(result.cell)
                    if now.left:
                        yield Begun(now.left[0].describe())
        self._end([*idle, *starting.values()])

    def _bury(
        self, now: _Running, error: Exception, deaths: Counter[TrajectoryKey], waiting: list[Task]
    ) -> Iterator[Event]:
        """What becomes of a trajectory whose worker has died: it goes on with another one, or is given up."""
        path = now.task.path
        deaths[path] += 1
        if not now.left:
            return
        if deaths[path] < MOST_DEATHS:
            LOGGER.warning("a worker died at %s; another one goes on from there", now.left[0].describe())
            waiting.insert(0, replace(now.task, cells=tuple(now.left)))
            return
        reason = f"the worker died {deaths[path]} times, out of memory perhaps: {reason_of(error)}"
        for cell in now.left:
            yield CellResult(cell=cell, status="failed", reason=reason)

    # Models that have been measured before

    def _save(self) -> Iterator[Event]:
        """Models of cells that a run has measured before: those of new cells have been saved where they were measured."""
        missing = sorted(
            cell for cell in self._work.models - self._work.cells if not model_folder(self._work.folder, cell).is_dir()
        )
        if not missing:
            return
        worker = self._new_worker()
        self._ray.get(self._first([worker.start.remote()]))
        for cell in missing:
            known = self._work.known(cell)
            if known is not None:
                yield Begun(cell.describe())
                yield from self._ray.get(self._first([worker.save.remote(cell, known)]))
        self._end([worker])

    # Timings

    def _time(self) -> Iterator[Event]:
        """All timings, on nodes that run nothing else, and that are alike where there are several."""
        waiting = [level for level in self._work.spec.levels() if level in self._work.timings]
        known = {level: self._known(level) for level in waiting}
        waiting = [level for level in waiting if known[level]]
        if not waiting:
            return
        owners = self._owners()
        if not owners:
            waited = f"within {self._node_timeout_s:.0f} s"
            reason = f"no node was free of other work {waited}, and what is timed beside other work is not comparable"
            for level in waiting:
                yield Timed(level, untimed(known[level], reason), complete=False, reason=reason)
            return
        running: dict[Any, tuple[Any, TimingKey]] = {}
        idle = list(owners)
        queues: dict[Any, list[TimingKey]] = {owner: [] for owner in owners}
        # What adaptation aims at is kept for one iteration at a time, so an iteration stays on one node.
        for iteration in sorted({iteration for _, iteration, _ in waiting}):
            owner = min(owners, key=lambda one: len(queues[one]))
            queues[owner] += [level for level in waiting if level[1] == iteration]
        while running or any(queues.values()):
            for owner in list(idle):
                if queues[owner]:
                    level = queues[owner].pop(0)
                    idle.remove(owner)
                    yield Begun(format_timing(level))
                    running[owner.time.remote(level, known[level])] = (owner, level)
            ready = self._first(list(running))
            owner, level = running.pop(ready)
            try:
                timed, trouble = self._ray.get(ready)
            except self._deaths() as error:
                self._check_head()
                reason = f"the worker died while it was timing: {reason_of(error)}"
                for lost in (level, *queues.pop(owner)):
                    yield Timed(lost, untimed(known[lost], reason), complete=False, reason=reason)
            else:
                idle.append(owner)
                yield from trouble
                yield timed
        self._end(owners)

    def _known(self, level: TimingKey) -> dict[str, KeptHeads]:
        """Heads and fingerprints of all variants that have been measured at a level."""
        method, iteration, at = level
        found = {v: self._work.known(Cell(v, method, iteration, at)) for v in self._work.spec.variants}
        return {variant: known for variant, known in found.items() if known is not None}

    def _owners(self) -> list[Any]:
        """Workers, each of which has claimed a whole node: all nodes that are like the first one that is free."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        starting = {}
        for node in self._nodes():
            options = {**self._options(), "num_cpus": node["Resources"]["CPU"]}
            if "num_gpus" in options:
                options["num_gpus"] = node["Resources"]["GPU"]
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            worker = self._worker.options(**options).remote(self._work.spec, self._shared)
            starting[worker.start.remote()] = worker
        LOGGER.info("waiting for a node without other work, to take timings on")
        ready, busy = self._ray.wait(list(starting), num_returns=len(starting), timeout=self._node_timeout_s)
        self._end([starting[ref] for ref in busy])
        owners, machine = [], None
        for ref in ready:
            here = self._ray.get(ref)
            machine = machine or here
            if here == machine:
                owners.append(starting[ref])
            else:
                self._end([starting[ref]])
        return owners

    # Workers

    def _options(self) -> dict[str, Any]:
        gpu = {"num_gpus": 1} if self._work.spec.device.startswith("cuda") else {}
        return {"num_cpus": self._work.spec.threads, "max_restarts": 0, **gpu}

    def _new_worker(self) -> Any:
        self._check_head()
        return self._worker.options(**self._options()).remote(self._work.spec, self._shared)

    def _nodes(self) -> list[dict[str, Any]]:
        """Nodes that are alive and have room for a worker."""
        self._check_head()
        gpu = 1 if self._work.spec.device.startswith("cuda") else 0
        return [
            node
            for node in self._ray.nodes()
            if node["Alive"]
            and node["Resources"].get("CPU", 0) >= self._work.spec.threads
            and node["Resources"].get("GPU", 0) >= gpu
        ]

    def _room(self) -> int:
        """How many workers there is room for."""
        room = 0
        for node in self._nodes():
            here = int(node["Resources"]["CPU"] // self._work.spec.threads)
            room += min(here, int(node["Resources"]["GPU"])) if self._work.spec.device.startswith("cuda") else here
        if not room:
            gpu = " and a GPU" if self._work.spec.device.startswith("cuda") else ""
            raise InputError(f"--threads: no node of the cluster has {self._work.spec.threads} cores{gpu}. Give fewer.")
        return room

    def _end(self, workers: Sequence[Any]) -> None:
        """Ends workers, so that what they claimed is free."""
        self._check_head()
        for worker in workers:
            self._ray.kill(worker)

    def _deaths(self) -> tuple[type[Exception], ...]:
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError, errors.NodeDiedError)


def tasks_of(spec: ComparisonSpec, cells: Collection[Cell]) -> list[Task]:
    """Cells as tasks, the longest first, so that no worker is left with a long one at the end; else in their order."""
    tasks: dict[TrajectoryKey, list[Cell]] = {}
    for cell in spec.cells():
        if cell in cells:
            variant = variant_named(cell.variant)
            rules = negotiation_rules(variant) if variant.negotiates else variant.name
            tasks.setdefault((rules, cell.method, cell.iteration), []).append(cell)

    def length(task: Task) -> int:
        variant = variant_named(task.path[0])
        return 2 * variant.negotiates + variant.adapts + (variant.selection == "progressive")

    return sorted((Task(path, tuple(found)) for path, found in tasks.items()), key=length, reverse=True)


@contextmanager
def _pickled_by_value(ray: Any, spec: ComparisonSpec) -> Iterator[None]:
    """Within it, the modules of a user's own methods travel to the workers, which need not be able to import them."""
    names = {method.function().__module__ for method in spec.own_methods} - {"__main__"}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _check_reachable(address: str) -> None:
    """ClusterError where nobody listens: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"{_NO_CLUSTER.format(address)}: {reason_of(error)}. Start one with ray start --head."
        ) from error


def _without(work: Work, event: Event) -> Work:
    """What is left to do after an event."""
    if isinstance(event, CellResult):
        return replace(work, cells=work.cells - {event.cell})
    if isinstance(event, LayersTimed):
        return replace(work, layer_times_s=event.layer_times_s)
    if isinstance(event, Timed):
        return replace(work, timings=work.timings - {event.level})
    return work


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())

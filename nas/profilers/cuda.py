"""This machine's NVIDIA GPU: networks compiled by `torch.compile`, captured as CUDA graphs, timed with CUDA events.

A model is compiled as one graph, whole (`fullgraph=True, dynamic=False`, inductor's default mode):

- in whole, because inductor fuses across blocks: a residual sum with the next block's layer norm, for one. Blocks that were
  compiled one by one would be slower than the same blocks in a network, and their table wrong. What repeats in a chain
  compiles quickly anyway: equal kernels have equal source and are built once;
- in the default mode: `max-autotune` tries dozens of kernels for every matrix product, minutes a network. cuDNN and cuBLAS
  compute convolutions and products here, and cuDNN's choice of algorithm is measured (`benchmark`);
- in the plain form, that of `nas.build_model` and of `nas-export --form plain`. Inductor makes one kernel of what follows a
  convolution (bias, batch norm, layer scale, activation, residual sum), and one of a pool mixer with the scale and the sum
  around it. The deploy form is made for ONNX Runtime on CPUs: there depthwise 1x1 convolutions stand for the mixer's scales,
  which would each be a kernel of cuDNN's that nothing fuses with, and linear layers as 1x1 convolutions want a copy to another
  layout. That is reasoned, not measured on a GPU yet: `benchmarks/gpu_claims.py --forms` does it;
- with the weights as inputs of the compiled graph, so that inductor's cache on disk holds for any weights. The cache is kept
  between runs (TORCHINDUCTOR_CACHE_DIR).

Python and the launches then have no part in the time: a captured graph is replayed. All graphs share one memory pool, for they
never run at once, and nobody reads what they computed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import os
import platform
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import platformdirs
import torch
from torch import Tensor, nn

from nas.alone import MEASURING, turn
from nas.export_forms import CUDA, CUDA_RUNTIME
from nas.measure import Model, build_module
from nas.profilers.bench import Disturbed, now
from nas.profilers.nvidia import POWER_CAP, Driver, Gpu, Watch, find_gpu, state, warnings_about
from nas.profilers.timing import Stopwatch, Workload
from nas.progress import say
from supernet.errors import InputError, first_line, unknown
from supernet.specs import MB4D, Layer

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PRECISION, BATCH = "fp16", 64  # the usual settings, which an id does not name

WARM_UP_MS = 200.0  # clocks rise for so long
EAGER_CALLS = 3  # before a capture: cuDNN chooses its algorithms and the allocator gets its memory
BURST_MS = 5.0  # at least: events tell half a microsecond apart
DISCARDED = 2  # replays before those that are timed
ASK_EVERY_S = 0.002  # during a burst, why the GPU is throttled
TRIES = 20  # of a burst, while the GPU is throttled
PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0  # after a throttled burst; doubled after each further one
PAUSES_AT_CAP = 3  # in vain, before a burst that only the power cap throttles is kept
RAMP_MS = 50.0  # of replays after a pause, in which clocks fell
KEPT_SHARE = 0.25  # of the GPU's memory, for captured models that will be visited again
OLDEST_OF_CUDNN = (7, 5)  # compute capability that cuDNN 9.11 and later take
FILLS = 16  # images: of fewer a GPU's cache may hold what a network must fetch from memory, and the host may be the slower one

PRODUCTS: Model = (Layer(MB4D(448), 14),) * 2
MAPS: Model = (Layer(MB4D(96), 56),) * 2
"""The references of a GPU: one that its arithmetic limits, which follows the clock of the multiprocessors, and one that its
memory limits, whose maps (154 MB inside a block, of 64 images in fp16) no GPU's cache holds. Those of CPUs are too small."""


class Found(NamedTuple):
    """What CUDA says of its current device; the UUID is without a prefix and, under MIG, may be the slice's."""

    name: str
    uuid: str | None
    memory_bytes: int
    capability: tuple[int, int]


class Graph(Protocol):
    """Something that starts on the GPU when it is replayed, and ends some time later."""

    def replay(self) -> None: ...


class Cuda:
    """CUDA, through torch: the only place that touches the GPU. Nothing is initialised before it is asked for a device."""

    def __init__(self) -> None:
        self._pool: Any = None  # of all graphs
        self._aside: Any = None  # the stream of all captures
        self._newest: Graph | None = None  # a pool without a graph is gone, and its handle then no good

    def missing(self) -> str | None:
        """Return what is missing to compile for an NVIDIA GPU here and what to do, None if nothing is."""
        version = torch.__version__
        if torch.version.hip is not None:
            return f"PyTorch {version} is built for AMD GPUs, which are not timed"
        if torch.version.cuda is None:
            return (
                f"PyTorch {version} is built without CUDA: on a machine with an NVIDIA GPU, `pip install --force-reinstall "
                "torch --index-url https://download.pytorch.org/whl/cu130`"
            )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if not torch.cuda.is_available():
                why = f" ({' '.join(str(said[0].message).split())[:200]})" if said else ""
                return (
                    f"PyTorch {version} finds no NVIDIA GPU or driver{why}: see what `nvidia-smi` and CUDA_VISIBLE_DEVICES say"
                )
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton, which is not installed: `pip install triton` (triton-windows on Windows)"
        return None

    def device(self) -> Found:
        """Return the device that CUDA uses first.

        Raises:
            InputError: CUDA cannot open it, because another process has it for itself, for one; or cuDNN cannot be used.
        """
        try:
            found = torch.cuda.get_device_properties(torch.cuda.current_device())
        except RuntimeError as error:
            why = str(error).splitlines()[0][:200]
            raise InputError(f"CUDA cannot open the GPU ({why}): see what `nvidia-smi` says, or use another device") from error
        try:
            torch.backends.cudnn.version()
        except RuntimeError as error:
            # torch refuses cuDNN where it is too new for any visible GPU, be that the one in use or not.
            visible = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            old = [f"GPU {i} ({gpu.name})" for i, gpu in enumerate(visible) if (gpu.major, gpu.minor) < OLDEST_OF_CUDNN]
            if not old:
                raise InputError(f"PyTorch cannot use its cuDNN ({first_line(error)}): install PyTorch anew") from error
            raise InputError(
                f"PyTorch's cuDNN is too new for {', '.join(old)}, and is then used on no GPU: set CUDA_VISIBLE_DEVICES to "
                "the others (`nvidia-smi -L`), or install a PyTorch with cuDNN 9.10 or earlier"
            ) from error
        uuid = getattr(found, "uuid", None)
        return Found(found.name, str(uuid) if uuid else None, found.total_memory, (found.major, found.minor))

    @property
    def place(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def in_use(self) -> bool:
        """Return whether the driver counts this process among those that compute: it has had memory of the GPU."""
        return torch.cuda.is_initialized() and torch.cuda.max_memory_reserved() > 0

    def capture(self, module: nn.Module, example: Tensor) -> Graph:
        """Return the graph of `module(example)`, compiled; both are on the GPU.

        Raises:
            InputError: the output is not finite.
        """
        if self._pool is None:
            self._pool, self._aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        with torch.inference_mode():
            run = compiled(module)
            self._aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._aside):
                for _ in range(EAGER_CALLS):
                    output = run(example)
            torch.cuda.current_stream().wait_stream(self._aside)
            refuse_infinite(output)
            del output
            graph = torch.cuda.CUDAGraph()
            # On the stream of the calls before: its workspaces are there, and one pool wants one stream.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._aside):
                run(example)  # the output goes back to the pool, where the next graph may have its place
        self._newest = graph
        return graph

    def elapsed_ms(self, graph: Graph, discarded: int, times: int, ask: Callable[[], object]) -> float:
        """Replay a graph `discarded` times, then `times` times; return the milliseconds of the latter on the GPU's clock.

        `ask` is called once the timed part has begun, and again every 2 ms until it is over; the last call may come that much
        later. Before the timed part the GPU may still be idle, because replays are only handed over.
        """
        start, end = self.event(), self.event()
        for _ in range(discarded):
            graph.replay()
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        start.synchronize()
        ask()
        while not end.query():
            self.rest()
            ask()
        return float(start.elapsed_time(end))

    def event(self) -> Any:
        """Return an event that knows when the GPU came to it."""
        return torch.cuda.Event(enable_timing=True)

    def rest(self) -> None:
        """Wait between two questions about a burst that goes on."""
        time.sleep(ASK_EVERY_S)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        """Give unused memory back to the driver."""
        self._pool = self._newest = None
        torch.cuda.empty_cache()


def compiled(module: nn.Module, backend: str = "inductor") -> Callable[[Tensor], Tensor]:
    """Return the module compiled as one graph for the shapes of its first input.

    What was compiled before is forgotten: models share their code (`Sequential.forward`), and torch refuses to compile the
    same code for many of them. Graphs that were captured stay valid all the same: their kernels belong to the modules that
    inductor generated, and those stay in its `PyCodeCache`. (A Triton kernel is unloaded when nothing refers to it any more.)
    """
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, dynamic=False, backend=backend)


def refuse_infinite(output: Tensor) -> None:
    """Refuse a network whose output has infinities or no numbers: power, and so the clock, depends on the data."""
    if not bool(output.isfinite().all()):
        raise InputError(
            f"the network's output is not finite in {str(output.dtype).removeprefix('torch.')}: give --precision bf16 or fp32, "
            "or other weights"
        )


class Captured:
    """A network captured as a CUDA graph. Calling it is one inference, and returns when that is done."""

    def __init__(self, graph: Graph, cuda: Cuda, held: tuple[nn.Module, Tensor]) -> None:
        self.graph = graph
        self.cuda = cuda
        self.held = held  # the graph has their addresses: they must live as long
        self.bytes = sum(t.nbytes for t in (*held[0].parameters(), *held[0].buffers(), held[1]))

    def __call__(self) -> None:
        self.graph.replay()
        self.cuda.wait()


class Bursts:
    """Times a captured network in bursts of at least 5 ms; drops those during which the GPU was throttled.

    A network that draws as much as the power cap allows would be dropped for ever, pauses or not. So after a few pauses in vain
    its bursts are kept, as long as nothing but the cap throttles them, and counted as such. The references run under the same
    cap, each at the clock that is left for it.
    """

    def __init__(self, cuda: Cuda, watch: Watch, sleep: Callable[[float], object] = time.sleep) -> None:
        self.cuda = cuda
        self.watch = watch
        self.sleep = sleep
        self._times: weakref.WeakKeyDictionary[Captured, int] = weakref.WeakKeyDictionary()
        self._at_cap: weakref.WeakKeyDictionary[Captured, int] = weakref.WeakKeyDictionary()  # bursts in a row, cap alone

    def __call__(self, run: Workload, between: Workload | None = None) -> float:
        """Return the milliseconds of one call. Replays follow one another without a gap, so nothing runs `between` them.

        Raises:
            Disturbed: the GPU was throttled in 20 bursts in a row, not by its power cap alone.
        """
        assert isinstance(run, Captured) and between is None
        discarded = DISCARDED
        for attempt in range(TRIES):
            ms, why = self._timed(run, discarded)
            self._at_cap[run] = self._at_cap.get(run, 0) + 1 if why == [POWER_CAP] else 0
            kept = not why or self._at_cap[run] > PAUSES_AT_CAP
            self.watch.record(why, kept=kept)
            if kept:
                if why and self.watch.bursts["kept_at_power_cap"] == 1:
                    say(
                        "warning: the GPU reaches its power cap even after pauses: such bursts are kept, and counted in the "
                        "sidecar; clocks held lower (`sudo nvidia-smi -lgc MHZ`) would be steadier"
                    )
                return ms
            if attempt < TRIES - 1:
                self.sleep(min(PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
            discarded = max(DISCARDED, math.ceil(RAMP_MS / ms))
        raise Disturbed(
            f"the GPU was throttled ({', '.join(why)}) in {TRIES} bursts in a row, with pauses: no table is written. Cool "
            "it, end other work, or hold its clocks lower (`sudo nvidia-smi -lgc MHZ`); the same command goes on from here"
        )

    def _timed(self, run: Captured, discarded: int) -> tuple[float, list[str]]:
        """Return the milliseconds of a call in one burst that was long enough, and why the GPU was throttled meanwhile."""
        times = self._times.get(run, 1)
        while True:
            total, why = self._burst(run, discarded, times)
            if total >= BURST_MS:
                self._times[run] = times
                return total / times, why
            times = max(2 * times, math.ceil(1.2 * times * BURST_MS / max(total, 1e-3)))

    def _burst(self, run: Captured, discarded: int, times: int) -> tuple[float, list[str]]:
        """Return the milliseconds of so many calls, and every reason for which the GPU was throttled at any moment of them."""
        answers: list[list[str]] = []

        def ask() -> None:
            if not answers:  # the GPU is at work now; the last time it may just have ended
                self.watch.look()
            answers.append(self.watch.throttled())

        total = self.cuda.elapsed_ms(run.graph, discarded, times, ask)
        return total, sorted({reason for answer in answers for reason in answer})


@dataclass(frozen=True, eq=False)
class NvidiaGpu:
    """torch.compile and CUDA graphs on this machine's NVIDIA GPU; implements `nas.measure.Profiler`."""

    gpu: Gpu
    precision: str = PRECISION
    batch: int = BATCH
    driver: Driver = field(default_factory=Driver)
    cuda: Cuda = field(default_factory=Cuda)
    flags: dict[str, str] = field(default_factory=dict, compare=False)
    _kept: dict[Model, Captured] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """The GPU's id, and what is not usual about the settings: `-bf16`, `-b1`."""
        return (
            self.gpu.id
            + (f"-{self.precision}" if self.precision != PRECISION else "")
            + (f"-b{self.batch}" if self.batch != BATCH else "")
        )

    @cached_property
    def watch(self) -> Watch:
        return Watch(self.driver, self.gpu)

    def environment(self) -> dict[str, Any]:
        """Return what is measured where. `gpu` is the GPU's state at this moment, after bursts with the clock, power and
        temperature of when it was last looked at during one: it has idled since. Its `bursts` says how many were kept and
        dropped so far, and the ranges of these three meanwhile."""
        found = {**state(self.driver, self.gpu, self.cuda.in_use()), **self.watch.last()}
        driver = found["driver"]
        return {
            "gpu": {**found, "bursts": self.watch.summary()},
            "driver": driver,
            "os": platform.platform(),
            "python_version": platform.python_version(),
            "runtime": CUDA_RUNTIME,
            "runtime_version": f"{torch.__version__}, CUDA {torch.version.cuda}",
            "torch_version": torch.__version__,
            "cudnn_version": torch.backends.cudnn.version(),
            "precision": self.precision,
            "batch": self.batch,
            "threads": 1,
            "export": CUDA,
            "warnings": [*warnings_about(found), *self.watch.warnings(found["max_sm_mhz"]), *self._batch_warnings()],
            "measured_at": now(),
        }

    def _batch_warnings(self) -> list[str]:
        if self.batch >= FILLS:
            return []
        return [
            f"{self.batch} image{'s' if self.batch > 1 else ''} a call may not fill a GPU: rows, whose weights stay in its "
            "cache, may be too small; measure what a search finds"
        ]

    def open(self, model: Model) -> tuple[Captured, int]:
        """Return a model with distinct ordinary weights, captured, and the bytes of its weights and input.

        A build opens every model once a pass, and other measurements every few visits; what was captured is kept for that as
        long as it fits into a quarter of the memory. So, unlike on a CPU, visits do not sample where its memory happens to lie:
        every opening would be another compilation.
        """
        if model not in self._kept:
            module, example = build_module(model, self.batch, deploy=False)
            # A graph must have a kernel; the smallest stands for the price of a call.
            run = self._capture(module if model else nn.ReLU(), example)
            if sum(kept.bytes for kept in self._kept.values()) + run.bytes > KEPT_SHARE * self.cuda.device().memory_bytes:
                return run, run.bytes
            self._kept[model] = run
        return self._kept[model], self._kept[model].bytes

    def open_module(self, module: nn.Module, example: Tensor) -> tuple[Captured, int]:
        """Return any module, captured with this input, and the bytes of both. The module itself stays as and where it is.

        Raises:
            InputError: it cannot be compiled as one graph, its output is not finite, or the GPU's memory does not suffice.
        """
        return (run := self._capture(copy.deepcopy(module), example)), run.bytes

    def _capture(self, module: nn.Module, example: Tensor) -> Captured:
        try:
            held = placed(module, example, PRECISIONS[self.precision], self.cuda.place)
            return Captured(self.cuda.capture(*held), self.cuda, held)
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(f"the GPU's memory does not suffice for {tuple(example.shape)}: give a smaller --batch") from error
        except RuntimeError as error:
            from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException  # takes seconds to import

            if not isinstance(error, TorchDynamoException):
                raise
            if isinstance(error, BackendCompilerFailed):
                raise InputError(
                    f"torch.compile cannot compile this network ({first_line(error.inner_exception)}): it needs a C compiler "
                    "(gcc) and Python's headers (python3-dev); else see what it says"
                ) from error
            raise InputError(
                f"torch.compile cannot make one graph of this network ({first_line(error)}): write the forward of its blocks "
                "without values of tensors, such as .item() or a branch on one, and without what is no operation of torch"
            ) from error

    def stopwatch(self) -> Stopwatch:
        bursts = Bursts(self.cuda, self.watch)
        # What is measured by references is compared across processes: cuDNN must not choose another algorithm in each. It keeps
        # what it has chosen for a shape, so the stopwatch is to be opened before models are.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            products, maps = self.open(PRODUCTS)[0], self.open(MAPS)[0]
        return Stopwatch(products, maps, burst=bursts, warm_up_ms=WARM_UP_MS)

    def between(self, most: int) -> None:
        """Nothing: at these batches the activations of a chain pass through the caches as those of a network do."""

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """When no other process of this package times anything, let cuDNN measure which algorithm is fastest, and keep fp32
        from being computed as TF32.

        At the end all that was captured is let go, as the memory may be wanted for training. So each measurement captures the
        references anew: two graphs, whose kernels are in inductor's cache by then, beside the network's own.
        """
        matmul_tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with turn(MEASURING), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
            self._kept.clear()
            self.cuda.release()


def placed(module: nn.Module, example: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return the module, changed, and a copy of its input on a device in a precision, channels-last where they are 4-D."""
    form = torch.channels_last if example.ndim == 4 else torch.preserve_format
    module = module.eval().requires_grad_(False)
    return (
        module.to(device=device, dtype=dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
        example.detach().to(device=device, dtype=dtype, memory_format=form, copy=True),
    )


def open_gpu(
    kind: str,
    threads: int | None = None,
    precision: str | None = None,
    batch: int | None = None,
    driver: Driver | None = None,
    cuda: Cuda | None = None,
) -> NvidiaGpu:
    """Return the profiler of the GPU that CUDA uses first (CUDA_VISIBLE_DEVICES chooses it). None: the usual setting.

    Raises:
        InputError: a GPU has no such setting; there is no CUDA, no GPU, or one that is too old; or `kind` is "a100" and
            this is not a whole A100.
    """
    if threads not in (None, 1):
        raise InputError(f"--threads {threads} is for CPUs: a GPU is fed by one thread; leave --threads out")
    precision = precision or PRECISION
    if precision not in PRECISIONS:
        raise unknown("precision of a GPU", precision, PRECISIONS)
    batch = BATCH if batch is None else batch
    if batch < 1:
        raise InputError(f"the batch must be a positive number of images, such as 64, but is {batch}")
    cuda, driver = cuda or Cuda(), driver or Driver()
    missing = cuda.missing()
    if missing is not None and driver.smi("-L") is None:
        raise InputError(
            f"there is no NVIDIA GPU here for --device {kind} (nvidia-smi, which comes with its driver, is missing or fails): "
            "give --device cpu, or use a machine that has one"
        )
    if missing is not None:
        raise InputError(f"--device {kind} needs CUDA: {missing}")
    found = cuda.device()
    if found.capability < (7, 0):
        raise InputError(
            f"{found.name} has compute capability {found.capability[0]}.{found.capability[1]}, but torch.compile "
            "needs 7.0 or later (Volta, 2017): use a newer GPU"
        )
    if precision == "bf16" and found.capability < (8, 0):
        raise InputError(f"{found.name} does not compute in bf16: give --precision fp16 or fp32")
    # Before anything is compiled in this process: torch's compiler writes its own choice there.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(platformdirs.user_cache_path("metapath-nas") / "inductor"))
    gpu = find_gpu(driver, found.name, found.uuid, found.memory_bytes)
    profiler = NvidiaGpu(gpu, precision, batch, driver, cuda)
    if kind == "a100" and not gpu.is_a100:
        what = f"a MIG slice ({gpu.mig}) of {gpu.name}" if gpu.mig else gpu.name
        raise InputError(
            f"--device a100 is for a whole A100, but the GPU here is {what}: `nas-build-lut --device cuda` measures it, as "
            f"{profiler.id}"
        )
    return profiler

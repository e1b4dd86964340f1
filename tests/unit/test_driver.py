"""The driver through ctypes: on a library of the tests' own with the same functions, and against NVIDIA's header."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from fake_driver import CALLS, WAITS, WRITES, FakeDriver

from fiddler_runtime import FiddlerError, FiddlerWarning
from fiddler_runtime.captured import cuda
from fiddler_runtime.lanes import driver as module
from fiddler_runtime.lanes.driver import Driver

HEADERS = (Path("/usr/local/cuda/include/cuda.h"), Path("/usr/include/cuda.h"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    fake = FakeDriver(tmp_path_factory.mktemp("driver"))
    yield fake
    fake.close()


@pytest.fixture
def fake(built: FakeDriver):
    built.native.fake_reset()
    yield built
    assert built.native.fake_registered() == 0, "memory was left registered"


def page() -> torch.Tensor:
    return torch.zeros(1024, dtype=torch.int32)


def test_a_stream_writes_and_waits_through_device_addresses(fake: FakeDriver):
    flags = page()
    host = flags.data_ptr()
    there = fake.driver.register(host, flags.nbytes)
    assert there != host, "the fake's device addresses are not the host's"
    fake.driver.write_value(fake.stream, there, 5)
    fake.driver.wait_value(fake.stream, there + 128, 3)
    fake.driver.write_value(fake.stream, there + 4, 6)
    while int(flags[0]) != 5:
        pass
    assert int(flags[1]) == 0, "behind the wait"
    flags[32] = 4  # 3 has been reached
    fake.synchronize()
    assert flags[:2].tolist() == [5, 6]
    assert [fake.native.fake_calls(kind) for kind in (WRITES, WAITS, CALLS)] == [2, 1, 0]
    fake.driver.unregister(host)


def test_the_drivers_words_are_passed_on(fake: FakeDriver):
    with pytest.raises(FiddlerError, match="cuMemHostUnregister: found error 713: pointer does not correspond"):
        fake.driver.unregister(64)
    with pytest.raises(FiddlerError, match="cuStreamWriteValue32_v2: found error 1: invalid argument"):
        fake.driver.write_value(fake.stream, 4096, 1)
    fake.native.fake_lock_limit(1000)
    with pytest.raises(FiddlerError, match="cuMemHostRegister_v2: found error 2: out of memory"):
        fake.driver.register(page().data_ptr(), 4096)


def test_no_driver_is_an_error_and_no_crash(tmp_path: Path):
    with pytest.raises(FiddlerError, match=r"cannot load NVIDIA's driver: .*expected libcuda.so.1 of CUDA 11"):
        Driver(tmp_path / "nothing.so")
    (tmp_path / "empty.c").write_text("int nothing;\n")
    library = tmp_path / "libempty.so"
    subprocess.run(["cc", "-shared", "-o", str(library), str(tmp_path / "empty.c")], check=True)
    with pytest.raises(FiddlerError, match=r"cannot load NVIDIA's driver: .*cuInit"):
        Driver(library)


def test_flags_are_chosen_where_a_graph_carries_them_out(fake: FakeDriver):
    assert fake.driver.version() == 12040
    assert cuda.choose(fake.driver, 0, fake.flags, fake.functions, lambda _: None).name == "stream memory operations"


def test_host_functions_are_the_fallback_and_say_why(fake: FakeDriver, tmp_path: Path):
    def choose(driver: Driver, failure: str | None) -> str:
        return cuda.choose(driver, 0, fake.flags, fake.functions, lambda _: failure).name

    with pytest.warns(
        FiddlerWarning, match=r"host functions, which take longer.*a captured write did not reach the host"
    ):
        assert choose(fake.driver, "a captured write did not reach the host") == "host functions"
    fake.native.fake_memory_operations(0)
    with pytest.warns(FiddlerWarning, match=r"the driver, CUDA 12.4, has none for this GPU"):
        assert choose(fake.driver, None) == "host functions"
    old = FakeDriver(tmp_path, "WITHOUT_MEMORY_OPERATIONS")
    with pytest.warns(FiddlerWarning, match="has none for this GPU"):
        assert choose(old.driver, None) == "host functions"
    old.close()


def test_names_and_numbers_are_those_of_nvidias_header(tmp_path: Path):
    header = next((path for path in HEADERS if path.exists()), None)
    if header is None:
        pytest.skip("no cuda.h on this machine")
    source = tmp_path / "check.c"
    source.write_text(
        f"""
        #include "{header}"
        CUresult (*write)(CUstream, CUdeviceptr, cuuint32_t, unsigned) = cuStreamWriteValue32;
        CUresult (*wait)(CUstream, CUdeviceptr, cuuint32_t, unsigned) = cuStreamWaitValue32;
        CUresult (*lock)(void*, size_t, unsigned) = cuMemHostRegister;
        CUresult (*unlock)(void*) = cuMemHostUnregister;
        CUresult (*address)(CUdeviceptr*, void*, unsigned) = cuMemHostGetDevicePointer;
        CUresult (*call)(CUstream, CUhostFn, void*) = cuLaunchHostFunc;
        CUresult (*attribute)(int*, CUdevice_attribute, CUdevice) = cuDeviceGetAttribute;
        CUresult (*device)(CUdevice*, int) = cuDeviceGet;
        CUresult (*text)(CUresult, const char**) = cuGetErrorString;
        CUresult (*version)(int*) = cuDriverGetVersion;
        CUresult (*init)(unsigned) = cuInit;
        _Static_assert(sizeof(CUdeviceptr) == 8 && sizeof(CUdevice) == sizeof(int) && sizeof(CUstream) == 8, "sizes");
        _Static_assert(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS == {module._STREAM_MEMORY_OPERATIONS}, "ops");
        _Static_assert(CU_STREAM_WAIT_VALUE_GEQ == {module._WAIT_GEQ}, "wait");
        _Static_assert(CU_STREAM_WRITE_VALUE_DEFAULT == {module._WRITE_DEFAULT}, "write");
        _Static_assert(CU_MEMHOSTREGISTER_PORTABLE == {module._REGISTER_PORTABLE}, "portable");
        _Static_assert(CU_MEMHOSTREGISTER_DEVICEMAP == {module._REGISTER_MAPPED}, "mapped");
        """
    )
    done = subprocess.run(["cc", "-c", str(source), "-o", str(tmp_path / "check.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = subprocess.run(["nm", "-u", str(tmp_path / "check.o")], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in names.splitlines()} == {*module._SIGNATURES, *module._MEMORY_OPERATIONS}

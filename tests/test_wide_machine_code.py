"""`wide24.cu` as it is compiled for Hopper, without a GPU: no spill, no wait, no register lost."""

import itertools
import re
import shutil
import subprocess

import pytest
import torch

from blockshock.kernels import nvrtc, wide24

SOURCE = (nvrtc.FOLDER / "wide24.cu").read_text(encoding="utf-8")


def compiled(folder, source, tile=wide24.TILES[0], dtype=torch.bfloat16, *, sums=False):
    """(What ptxas says, the machine code) of the kernel with a bias, for sm_90a."""
    triton = pytest.importorskip("triton", reason="needs Triton's disassembler")
    (folder / "wide24.cu").write_text(wide24.prelude_of(dtype, tile) + source, encoding="utf-8")
    command = ["nvcc", "-gencode", "arch=compute_90a,code=sm_90a", "-std=c++17", "-Xptxas", "-v"]
    constants = wide24.macros(dtype, True, tile, sums=sums)
    command += [f"-D{key}={value}" for key, value in constants.items()]
    command += ["-cubin", "-o", str(folder / "cubin"), str(folder / "wide24.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-fun", "product", folder / "cubin"]
    code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return done.stdout + done.stderr, code


def written_in_flight(code):
    """(Products, registers that are written while one reads them as A or as places), of all paths.

    State: the registers of the products since the last commit, and of each commit in flight.
    """
    lines = {int(at, 16): text for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?) *;", code)}
    after = dict(itertools.pairwise(lines))
    products, found, seen, todo = set(), set(), set(), [(min(lines), frozenset(), ())]
    while todo:
        state = at, batch, flying = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        line = lines[at]
        if "HGMMA" in line:
            given = re.search(r"R\d+, R(\d+), gdesc\S+, R\d+,(?: !?UPT?\d*,)? R(\d+)", line)
            a, places = map(int, given.groups())
            products.add(at)
            batch |= {a, a + 1, a + 2, a + 3, places}
            if "gsb0" in line:
                batch, flying = frozenset(), (*flying, batch)
        elif left := re.search(r"DEPBAR.LE gsb0, 0x(\d)", line):
            flying = flying[len(flying) - int(left[1]) :] if int(left[1]) else ()
        elif given := re.match(r"(?:@!?U?P\d+ )?(\S+) R(\d+),", line):
            size = {"LDSM": 4, "64": 2, "128": 4, "WIDE": 2}
            wide = max(n for part, n in ({"": 1} | size).items() if part in given[1])
            target = set(range(int(given[2]), int(given[2]) + wide))
            found |= target & batch.union(*flying)
        leaves = re.match(r"(@\S+ )?(?:BRA\S* (\S+, )?0x([0-9a-f]+)|EXIT)", line)
        if leaves and leaves[3]:
            todo.append((int(leaves[3], 16), batch, flying))
        if at in after and (not leaves or leaves[1] or leaves[2]):
            todo.append((after[at], batch, flying))
    return len(products), found


@pytest.mark.parametrize("fault", [None, "at the start of the loop", "after the loop"])
def test_the_reader_of_machine_code_follows_all_paths(fault):
    """Two sets take turns in a loop, and a third one comes where their number is odd."""
    product = "HGMMA.SP.64x256x32.F32.BF16 R24, R{0}, gdesc[UR12], R24, UP0, R{1}, 0x0, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    write = "@!P0 IMAD.WIDE R6, R1, R2, R3"  # R6, R7
    code = [write if fault == "at the start of the loop" else "NOP", "LDSM.16.M88.4 R0, [R30]"]
    code += [product.format(0, 8), wait, "LDSM.16.M88.4 R4, [R30]", product.format(4, 9), wait]
    code += ["@P1 BRA 0x0", "@P2 BRA 0xd0", "LDSM.16.M88.4 R12, [R30]", product.format(12, 10)]
    code += [wait, "NOP", write if fault == "after the loop" else "NOP"]
    code += ["WARPGROUP.DEPBAR.LE gsb0, 0x0", write, "@P3 BRA 0x0", "EXIT"]
    text = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(code))
    assert written_in_flight(text) == (3, {6, 7} if fault else set())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit")
@pytest.mark.parametrize("tile", wide24.TILES)
@pytest.mark.parametrize(("dtype", "sums"), list(itertools.product(wide24.DTYPES, (False, True))))
def test_no_product_waits_spills_or_loses_its_registers(dtype, sums, tile, tmp_path):
    report, code = compiled(tmp_path, SOURCE, tile, dtype, sums=sums)
    assert "Performance Loss" not in report, report  # wgmma one after the other
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report
    products = code[code.index("HGMMA") : code.rindex("HGMMA")]
    for wait in ("MEMBAR.ALL.GPU", "ERRBAR", "LDL", "STL"):  # a round trip to L2, a spill
        assert wait not in products, wait
    count, lost = written_in_flight(code)
    assert count == 6  # two of each step: a loop of two, and one where their number is odd
    assert not lost


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit")
def test_registers_that_are_lost_in_flight_are_found(tmp_path):
    one = SOURCE.replace("block + 1 < blocks; block += 2", "block < blocks; block++")
    one = one.replace("                step(a[1], block + 1);\n", "")
    one = one.replace("            if (blocks % 2) step(a[0], blocks - 1);\n", "")
    count, lost = written_in_flight(compiled(tmp_path, one)[1])
    assert count == 2
    assert lost

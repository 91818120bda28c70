"""The BPF interpreter answers as the kernel does and refuses what it refuses."""

import pytest

from .bpf import (
    ABS,
    ADD,
    ALU,
    AND,
    DIV,
    IMM,
    JA,
    JEQ,
    JGE,
    JGT,
    JMP,
    JSET,
    LD,
    LDX,
    LEN,
    LSH,
    MEM,
    MISC,
    MUL,
    NEG,
    OR,
    RET,
    RSH,
    ST,
    STX,
    SUB,
    TAX,
    TXA,
    XOR,
    A,
    BpfError,
    K,
    W,
    X,
    assemble,
    run,
)

AUDIT_ARCH_X86_64 = 0xC000003E
RETURN_A = (RET | A, 0, 0, 0)


def answer(*instructions: tuple[int, int, int, int]) -> int:
    args = [0x1111111122222222, 0xFFFFFFFFC020462A, 3, 4, 5, 0x8000000000000006]
    return run(assemble(*instructions), 16, AUDIT_ARCH_X86_64, args, ip=0x7FFF00001234)


@pytest.mark.parametrize(
    ("offset", "word"),
    [
        (0, 16),
        (4, AUDIT_ARCH_X86_64),
        (8, 0x00001234),
        (12, 0x7FFF),
        (16, 0x22222222),
        (20, 0x11111111),
        (24, 0xC020462A),
        (28, 0xFFFFFFFF),
        (56, 6),
        (60, 0x80000000),
    ],
)
def test_loads_seccomp_data(offset: int, word: int) -> None:
    assert answer((LD | W | ABS, 0, 0, offset), RETURN_A) == word


def test_negative_system_call_number_is_unsigned_in_the_program() -> None:
    assert run(assemble((LD | W | ABS, 0, 0, 0), RETURN_A), -1, 0, []) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("operation", "operand", "result"),
    [
        (ADD, 0xFFFFFFFF, 99),
        (SUB, 101, 0xFFFFFFFF),
        (MUL, 0x80000001, 100),
        (DIV, 7, 14),
        (OR, 3, 103),
        (AND, 0x60, 0x60),
        (XOR, 0xFFFFFFFF, 0xFFFFFF9B),
        (LSH, 31, 0),
        (RSH, 2, 25),
    ],
)
def test_arithmetic_is_32_bits_with_either_operand(operation: int, operand: int, result: int) -> None:
    load = (LD | IMM, 0, 0, 100)
    assert answer(load, (ALU | operation | K, 0, 0, operand), RETURN_A) == result
    assert answer(load, (LDX | IMM, 0, 0, operand), (ALU | operation | X, 0, 0, 0), RETURN_A) == result


def test_negation() -> None:
    assert answer((LD | IMM, 0, 0, 1), (ALU | NEG, 0, 0, 0), RETURN_A) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("condition", "operand", "taken"),
    [
        (JEQ, 5, True),
        (JEQ, 4, False),
        (JGT, 4, True),
        (JGT, 5, False),
        (JGE, 5, True),
        (JGE, 0xFFFFFFFF, False),
        (JSET, 4, True),
        (JSET, 2, False),
    ],
)
def test_conditional_jumps(condition: int, operand: int, taken: bool) -> None:  # noqa: FBT001 - a parameter
    ends = [(RET | K, 0, 0, 1), (RET | K, 0, 0, 0)]
    assert answer((LD | IMM, 0, 0, 5), (JMP | condition | K, 0, 1, operand), *ends) == taken
    loads = [(LD | IMM, 0, 0, 5), (LDX | IMM, 0, 0, operand)]
    assert answer(*loads, (JMP | condition | X, 0, 1, 0), *ends) == taken


def test_unconditional_jump() -> None:
    assert answer((JMP | JA, 0, 0, 1), (RET | K, 0, 0, 1), (RET | K, 0, 0, 2)) == 2


def test_memory_and_registers() -> None:
    assert answer((LD | IMM, 0, 0, 7), (ST, 0, 0, 15), (LD | IMM, 0, 0, 0), (LD | MEM, 0, 0, 15), RETURN_A) == 7
    assert answer((LDX | IMM, 0, 0, 8), (STX, 0, 0, 0), (LD | MEM, 0, 0, 0), RETURN_A) == 8
    assert answer((LD | IMM, 0, 0, 9), (ST, 0, 0, 1), (LDX | MEM, 0, 0, 1), (MISC | TXA, 0, 0, 0), RETURN_A) == 9
    swap = [(LD | IMM, 0, 0, 9), (MISC | TAX, 0, 0, 0), (LD | IMM, 0, 0, 0), (MISC | TXA, 0, 0, 0)]
    assert answer(*swap, RETURN_A) == 9
    assert answer((LD | W | LEN, 0, 0, 0), RETURN_A) == 64
    assert answer((LDX | W | LEN, 0, 0, 0), (MISC | TXA, 0, 0, 0), RETURN_A) == 64


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(b"", id="empty"),
        pytest.param(assemble(RETURN_A)[:-1], id="half an instruction"),
        pytest.param(assemble(*[(LD | IMM, 0, 0, 0)] * 4096, RETURN_A), id="too long"),
        pytest.param(assemble((LD | IMM, 0, 0, 0)), id="no return"),
        pytest.param(assemble((LD | 0x08 | ABS, 0, 0, 0), RETURN_A), id="halfword load"),
        pytest.param(assemble((LD | W | 0x40, 0, 0, 0), RETURN_A), id="indexed load"),
        pytest.param(assemble((ALU | 0x90 | K, 0, 0, 2), RETURN_A), id="modulo, which seccomp refuses"),
        pytest.param(assemble((RET | X, 0, 0, 0)), id="return X"),
        pytest.param(assemble((0x8000 | RET, 0, 0, 0)), id="high opcode bits"),
        pytest.param(assemble((LD | W | ABS, 0, 0, 64), RETURN_A), id="load behind the data"),
        pytest.param(assemble((LD | W | ABS, 0, 0, 62), RETURN_A), id="unaligned load"),
        pytest.param(assemble((LD | W | ABS, 0, 0, 0xFFFFFFFC), RETURN_A), id="load before the data"),
        pytest.param(assemble((ST, 0, 0, 16), RETURN_A), id="memory word 16"),
        pytest.param(assemble((LD | MEM, 0, 0, 3), RETURN_A), id="memory read before written"),
        pytest.param(assemble((ALU | DIV | K, 0, 0, 0), RETURN_A), id="division by 0"),
        pytest.param(assemble((ALU | DIV | X, 0, 0, 0), RETURN_A), id="division by X of 0"),
        pytest.param(assemble((ALU | LSH | K, 0, 0, 32), RETURN_A), id="shift by 32"),
        pytest.param(assemble((LDX | IMM, 0, 0, 32), (ALU | RSH | X, 0, 0, 0), RETURN_A), id="shift by X of 32"),
        pytest.param(assemble((JMP | JA, 0, 0, 1), RETURN_A), id="jump behind the end"),
        pytest.param(assemble((JMP | JA, 0, 0, 0xFFFFFFFF), RETURN_A), id="jump backwards"),
        pytest.param(assemble((JMP | JEQ | K, 0, 1, 0), RETURN_A), id="jump behind the end, not taken"),
    ],
)
def test_refuses(program: bytes) -> None:
    with pytest.raises(BpfError):
        run(program, 0, 0, [])

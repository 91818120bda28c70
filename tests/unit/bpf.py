"""A strict interpreter for seccomp's classic BPF.

It runs what seccomp_check_filter (kernel/seccomp.c) and bpf_check_classic (net/core/filter.c) let in, and
raises where the kernel would refuse the program or make up a value: so a filter that passes here is exact.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

# include/uapi/linux/bpf_common.h, include/uapi/linux/filter.h
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
W, IMM, ABS, MEM, LEN = 0x00, 0x00, 0x20, 0x60, 0x80
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, XOR = 0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xA0
JA, JEQ, JGT, JGE, JSET = 0x00, 0x10, 0x20, 0x30, 0x40
K, X, A = 0x00, 0x08, 0x10
TAX, TXA = 0x00, 0x80
MAX_INSTRUCTIONS = 4096
MEMORY_WORDS = 16

_U32 = 0xFFFFFFFF
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter
_DATA = struct.Struct("<iIQ6Q")  # struct seccomp_data, of a little-endian machine

_OPERATIONS: dict[int, Callable[[int, int], int]] = {
    ADD: operator.add,
    SUB: operator.sub,
    MUL: operator.mul,
    DIV: operator.floordiv,
    OR: operator.or_,
    AND: operator.and_,
    LSH: operator.lshift,
    RSH: operator.rshift,
    XOR: operator.xor,
}
_CONDITIONS: dict[int, Callable[[int, int], bool]] = {
    JEQ: operator.eq,
    JGT: operator.gt,
    JGE: operator.ge,
    JSET: lambda a, b: bool(a & b),
}


class BpfError(Exception):
    """The kernel would refuse this program, or its outcome is not defined."""


def _refuse(problem: str) -> NoReturn:
    raise BpfError(problem)


class Instruction(NamedTuple):
    code: int
    jt: int
    jf: int
    k: int


def assemble(*instructions: tuple[int, int, int, int]) -> bytes:
    """Pack (code, jt, jf, k) instructions into a program."""
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def run(program: bytes, nr: int, arch: int, args: Sequence[int], ip: int = 0) -> int:
    """Return what the program answers to this system call: a SECCOMP_RET_* value with its data.

    args are up to six 64-bit registers; absent ones are 0. Raises BpfError.
    """
    code = _decode(program)
    padded = [*args, *[0] * (6 - len(args))]
    data = _DATA.pack(nr, arch, ip, *padded)
    a = x = at = 0
    memory: dict[int, int] = {}
    while True:
        op = code[at]
        at += 1
        operand = x if op.code & X else op.k
        match op.code & 0x07:
            case 0x00 | 0x01:  # LD, LDX
                value = _load(op, data, memory)
                a, x = (value, x) if op.code & 0x07 == LD else (a, value)
            case 0x02 | 0x03:  # ST, STX
                memory[op.k] = a if op.code == ST else x
            case 0x04:  # ALU
                a = _alu(op.code & 0xF0, a, operand)
            case 0x05 if op.code == JMP | JA:
                at += op.k
            case 0x05:  # JMP
                at += op.jt if _CONDITIONS[op.code & 0xF0](a, operand) else op.jf
            case 0x06:  # RET
                return a if op.code & A else op.k
            case _:  # MISC
                a, x = (a, a) if op.code == MISC | TAX else (x, x)


def _decode(program: bytes) -> list[Instruction]:
    """Check what the kernel checks when the filter is installed, on every path, taken or not."""
    if not program or len(program) % _INSTRUCTION.size:
        _refuse(f"{len(program)} bytes are not a whole number of instructions")
    code = [Instruction(*fields) for fields in _INSTRUCTION.iter_unpack(program)]
    if len(code) > MAX_INSTRUCTIONS:
        _refuse(f"{len(code)} instructions")
    for at, op in enumerate(code):
        problem = _problem(op, len(code) - at - 1)
        if problem:
            _refuse(f"instruction {at} {op}: {problem}")
    if code[-1].code & 0x07 != RET:
        _refuse("does not end with a return")
    return code


def _problem(op: Instruction, following: int) -> str | None:
    """Name what is wrong with one instruction that has so many behind it. Jumps are unsigned: forwards."""
    problem = None
    if op.code not in _LEGAL:
        problem = "unknown opcode"
    elif op.code == LD | W | ABS and (op.k % 4 or op.k + 4 > _DATA.size):
        problem = "load outside of seccomp_data or not aligned"
    elif op.code in _MEMORY_OPCODES and op.k >= MEMORY_WORDS:
        problem = "memory word out of range"
    elif op.code == ALU | DIV | K and op.k == 0:
        problem = "division by zero"
    elif op.code in (ALU | LSH | K, ALU | RSH | K) and op.k >= 32:
        problem = "shift by 32 or more"
    elif op.code & 0x07 == JMP and (op.k if op.code == JMP | JA else max(op.jt, op.jf)) >= following:
        problem = "jump out of the program"
    return problem


def _load(op: Instruction, data: bytes, memory: dict[int, int]) -> int:
    mode = op.code & 0xE0
    if mode == ABS:
        return int.from_bytes(data[op.k : op.k + 4], "little")
    if mode == LEN:
        return len(data)
    if mode == MEM:
        if op.k not in memory:
            _refuse(f"memory word {op.k} is read before it is written")
        return memory[op.k]
    return op.k


def _alu(operation: int, a: int, operand: int) -> int:
    if operation == NEG:
        return -a & _U32
    if operation == DIV and operand == 0:
        _refuse("division by zero")
    if operation in (LSH, RSH) and operand >= 32:
        _refuse("shift by 32 or more")
    return _OPERATIONS[operation](a, operand) & _U32


_MEMORY_OPCODES = frozenset({LD | MEM, LDX | MEM, ST, STX})
_LEGAL = frozenset(
    {LD | W | ABS, LD | W | LEN, LDX | W | LEN, LD | IMM, LDX | IMM, RET | K, RET | A}
    | {ALU | NEG, JMP | JA, MISC | TAX, MISC | TXA}
    | {ALU | operation | source for operation in _OPERATIONS for source in (K, X)}
    | {JMP | condition | source for condition in _CONDITIONS for source in (K, X)}
    | _MEMORY_OPCODES
)

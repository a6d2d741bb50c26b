"""A seccomp filter as bytes: the system calls that a sandboxed program may not make.

Classic BPF (struct sock_filter, linux/filter.h) over struct seccomp_data (linux/seccomp.h). Denied
calls fail with EPERM; clone3 with ENOSYS, so that the C library falls back to clone, whose flags a
filter can read. A program of another architecture is killed.
"""

import errno
import platform
import struct

# name: (x86_64, aarch64), None where the architecture has no such call.
DENIED = {
  'socket': (41, 198), 'ptrace': (101, 117), 'process_vm_readv': (310, 270),
  'process_vm_writev': (311, 271), 'kcmp': (312, 272), 'pidfd_getfd': (438, 438),
  'mount': (165, 40), 'umount2': (166, 39), 'pivot_root': (155, 41), 'chroot': (161, 51),
  'open_tree': (428, 428), 'move_mount': (429, 429), 'fsopen': (430, 430), 'fsconfig': (431, 431),
  'fsmount': (432, 432), 'fspick': (433, 433), 'mount_setattr': (442, 442),
  'unshare': (272, 97), 'setns': (308, 268), 'io_uring_setup': (425, 425),
  'io_uring_enter': (426, 426), 'io_uring_register': (427, 427), 'add_key': (248, 217),
  'request_key': (249, 218), 'keyctl': (250, 219), 'bpf': (321, 280),
  'perf_event_open': (298, 241), 'userfaultfd': (323, 282), 'kexec_load': (246, 104),
  'kexec_file_load': (320, 294), 'init_module': (175, 105), 'finit_module': (313, 273),
  'delete_module': (176, 106), 'reboot': (169, 142), 'swapon': (167, 224), 'swapoff': (168, 225),
  'acct': (163, 89), 'quotactl': (179, 60), 'name_to_handle_at': (303, 264),
  'open_by_handle_at': (304, 265), 'fanotify_init': (300, 262), 'syslog': (103, 116),
  'settimeofday': (164, 170), 'clock_settime': (227, 112), 'adjtimex': (159, 171),
  'clock_adjtime': (305, 266), 'personality': (135, 92), 'lookup_dcookie': (212, 18),
  'sethostname': (170, 161), 'setdomainname': (171, 162), 'vhangup': (153, 58),
  'iopl': (172, None), 'ioperm': (173, None), 'modify_ldt': (154, None), 'uselib': (134, None),
  # Memory that no address-space limit counts.
  'memfd_create': (319, 279), 'memfd_secret': (447, 447), 'shmget': (29, 194),
  'msgget': (68, 186), 'semget': (64, 190), 'mq_open': (240, 180)}
_CLONE, _IOCTL, _CLONE3 = (56, 220), (16, 29), 435
_ARCHITECTURES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # push characters into a terminal
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24  # offsets; the low words of arguments


def make_filter(machine=None):
  """The filter's bytes for `machine` (default: this one's), or ValueError for one unknown."""
  machine = machine or platform.machine()
  if machine not in _ARCHITECTURES:
    raise ValueError(f'no system call table for {machine!r}; want one of {sorted(_ARCHITECTURES)}')
  column, audit = _ARCHITECTURES[machine]
  numbers = sorted(row[column] for row in DENIED.values() if row[column] is not None)
  # (code, operand, where to go if true); what is false goes on to the next instruction.
  program = [
    (_LOAD, _ARCHITECTURE, None), (_EQUAL, audit, 'known'), (_RETURN, _KILL, None), 'known',
    (_LOAD, _NUMBER, None), (_AT_LEAST, 0x40000000, 'absent'), (_EQUAL, _CLONE3, 'absent'),
    *((_EQUAL, number, 'deny') for number in numbers),
    (_EQUAL, _CLONE[column], 'clone'), (_EQUAL, _IOCTL[column], 'ioctl'), (_RETURN, _ALLOW, None),
    'clone', (_LOAD, _FIRST, None), (_ANY_BIT, _NAMESPACES, 'deny'), (_RETURN, _ALLOW, None),
    'ioctl', (_LOAD, _SECOND, None), (_EQUAL, _TIOCSTI, 'deny'), (_EQUAL, _TIOCLINUX, 'deny'),
    (_RETURN, _ALLOW, None),
    'deny', (_RETURN, _FAIL | errno.EPERM, None), 'absent', (_RETURN, _FAIL | errno.ENOSYS, None)]
  places, length = {}, 0
  for step in program:
    if isinstance(step, str):
      places[step] = length
    else:
      length += 1
  steps = [step for step in program if not isinstance(step, str)]
  return b''.join(struct.pack('=HBBI', code, places[target] - i - 1 if target else 0, 0, operand)
                  for i, (code, operand, target) in enumerate(steps))

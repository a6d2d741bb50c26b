"""Presets of TPU compiler flags that others publish, by name; none is used unless asked for.

`config.xla` names one, for training and for `plan`. Each was compiled, for the generations that are
named, by libtpu 0.0.50.1 (`tests/scaling/test_flags.py`); whether it makes a step faster only a TPU
can tell. Sources: MaxText's benchmarks/xla_flags_library.py of 2025-26 (AI-Hypercomputer/maxtext on
GitHub), and for tpu7x Google's training recipe of qwen3-235b-a22b (AI-Hypercomputer/tpu-recipes,
training/ironwood). What they publish and this compiler refuses is not here: the asynchronous
collective fusions on v5p and v6e ("FAILED_PRECONDITION"), which are v5e's alone, and the sparse
cores' 2a886c8_chip_config_name=megachip_tccontrol ("unknown command line flag").
"""
import os
from typing import NamedTuple

VARIABLE = 'LIBTPU_INIT_ARGS'


class Preset(NamedTuple):
  """Flags, and the TPU generations whose compiler takes them."""
  generations: tuple
  flags: tuple
  meaning: str


_FUSION = ('xla_tpu_enable_async_collective_fusion=true',
           'xla_tpu_enable_async_collective_fusion_multiple_steps=true',
           'xla_tpu_overlap_compute_collective_tc=true')
_SPARSECORE = ('xla_sc_disable_megacore_partitioning=true',
               'xla_tpu_use_tc_device_shape_on_sc=true',
               'xla_sc_enable_instruction_fusion=false', 'xla_sc_disjoint_spmem=false')

PRESETS = {
  'fuse_gathers': Preset(
    ('v5e',), (*_FUSION, 'xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
               'xla_enable_async_all_gather=true'),
    'all-gathers run within the products beside them (CF_FOR_ALL_GATHER)'),
  'fuse_reductions': Preset(
    ('v5e',), (*_FUSION, 'xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true',
               'xla_enable_async_all_reduce=true'),
    'all-reduces run within the products beside them (CF_FOR_ALL_REDUCE)'),
  'sparsecore_reductions': Preset(
    ('v5p', 'v6e'), (*_SPARSECORE, 'xla_tpu_enable_all_reduce_offload_tracing=true',
                     'xla_tpu_enable_sparse_core_collective_offload_all_reduce=true'),
    'all-reduces run on the sparse cores (ENABLE_SPARECORE_OFFLOADING_FOR_ALL_REDUCE)'),
  'sparsecore': Preset(
    ('v5p', 'v6e'), (*_SPARSECORE, 'xla_tpu_enable_async_collective_fusion_fuse_all_gather=false',
                     'xla_tpu_enable_all_gather_offload_tracing=true',
                     'xla_tpu_enable_all_reduce_offload_tracing=true',
                     'xla_tpu_enable_sparse_core_collective_offload_all_gather=true',
                     'xla_tpu_enable_sparse_core_collective_offload_all_reduce=true'),
    'all-gathers and all-reduces run on the sparse cores '
    '(ENABLE_SPARECORE_OFFLOADING_FOR_ALL_REDUCE_AND_ALL_GATHER)'),
  'vmem_dense': Preset(
    ('v6e',), ('xla_tpu_scoped_vmem_limit_kib=98304',),
    'fusions of dense models may take 96 MiB of VMEM (DENSE_VMEM_LIMIT_FLAG)'),
  'vmem_moe': Preset(
    ('v6e',), ('xla_tpu_scoped_vmem_limit_kib=81920',),
    'fusions of mixtures may take 80 MiB of VMEM (MOE_VMEM_LIMIT_FLAG)'),
  'vmem_tpu7x': Preset(
    ('tpu7x',), ('xla_tpu_scoped_vmem_limit_kib=61440',),
    'fusions may take 60 MiB of VMEM (tpu-recipes)'),
  'slices': Preset(
    ('v5e', 'v5p', 'v6e', 'tpu7x'), ('xla_tpu_enable_data_parallel_all_reduce_opt=true',
                                     'xla_tpu_data_parallel_opt_different_sized_ops=true'),
    'all-reduces between slices overlap with the backward pass (DATA_PARALLEL_OVERLAP)'),
}


def use(name, generation=None):
  """Adds the flags of preset `name` to what libtpu reads when it is first used; None: nothing.

  Raises ValueError for a name that does not exist and for one that `generation` cannot take.
  """
  if name is None:
    return
  if name not in PRESETS:
    raise ValueError(f'config.xla is {name!r}; want one of {", ".join(PRESETS)}, or None')
  preset = PRESETS[name]
  if generation and generation not in preset.generations:
    others = [other for other, each in PRESETS.items() if generation in each.generations]
    raise ValueError(f'config.xla={name} is for {", ".join(preset.generations)}, not '
                     f'{generation}, which takes {", ".join(others)}')
  given = os.environ.get(VARIABLE, '').split()
  os.environ[VARIABLE] = ' '.join(dict.fromkeys(
    [*given, *(f'--{flag}' for flag in preset.flags)]))

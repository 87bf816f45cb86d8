"""Weights that arrive tensor by tensor, on the host and on devices; and the checksum that is taken on the way."""

import functools
import zlib

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from qalora_jax import build
from qalora_jax import checksum
from qalora_jax import hf
from qalora_jax import packed
from qalora_jax import sharding
from qalora_jax import stacks
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import float4
from qalora_jax.quant import method

CONFIG = decoder.Config(64, 32, 64, 3, 4, 2, max_position_embeddings=64, head_dim=8)
DOUBLED = float4.Float4(group=16, double=True)
SCHEMES = {
  'dense': linear.Scheme(frozen_dtype=jnp.bfloat16),
  # Two stacks: the last layer's down_proj is of another form.
  'quantized': linear.Scheme(
    quantizers=(('layers/2/.*down', affine.Affine(3, 16, True)), ('attention', DOUBLED), ('all', affine.Affine(4, 8)))
  ),
  'trained': linear.Scheme(trains=True, quantizers=(('all', method.QAT(affine.Affine(4, 16), learned=True)),)),
}


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_checksums_add_as_texts_do(texts):
  parts = [checksum.Checksum(zlib.crc32(text), len(text)) for text in texts]
  whole = b''.join(texts)
  assert sum(parts, checksum.Checksum()) == checksum.Checksum(zlib.crc32(whole), len(whole))


def test_checksums_of_long_texts():
  """A text of 32 MiB, doubled from one of 1 KiB."""
  part = bytes(range(256)) * 4
  grown = checksum.Checksum(zlib.crc32(part), len(part))
  for _ in range(15):
    grown = grown + grown
  assert grown == checksum.Checksum(zlib.crc32(part * 2**15), len(part) * 2**15)


@pytest.mark.parametrize('dtype', [None, np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize('shape', [(), (0,), (7,), (300, 5), (3, 4, 5)])
def test_the_checksum_of_an_array_is_that_of_its_bytes(shape, dtype, monkeypatch):
  monkeypatch.setattr(checksum, '_AT_ONCE', 64)
  array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  for each in (array, array.T, jnp.asarray(array)):
    wanted = np.asarray(each).astype(dtype or np.float32).tobytes()
    assert checksum.of(each, dtype) == checksum.Checksum(zlib.crc32(wanted), len(wanted))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  directory = tmp_path_factory.mktemp('stacks') / 'model'
  hf.write(directory, CONFIG, small_llama.draw(CONFIG), dtype='bfloat16')
  return directory


@functools.cache
def on_host(source, kind):
  return hf.load(source, CONFIG, SCHEMES[kind])


@functools.cache
def abstract(scheme):
  made = jax.eval_shape(decoder.Decoder(CONFIG, scheme).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  return made['params' if scheme.trains else 'frozen']


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2), (8, 1, 1)], ids=str)
@pytest.mark.parametrize('kind', SCHEMES)
def test_on_devices_is_on_the_host(source, kind, sizes):
  """Bit for bit, on the shards where `sharding.place` wants them, with the checksum of the tree on the host."""
  scheme = SCHEMES[kind]
  wanted = on_host(source, kind)
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)), devices=jax.devices()[: np.prod(sizes)])
  at = sharding.place(abstract(scheme), mesh)
  place = stacks.OnDevices(at)
  found = hf.load(source, CONFIG, scheme, place=place)
  small_llama.same(found, wanted)
  jax.tree.map(
    lambda leaf, where: (leaf.sharding == where) or pytest.fail(f'{leaf.sharding} is not {where}'), found, at
  )
  crc = 0
  for leaf in jax.tree.leaves(wanted):
    crc = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8), crc)
  assert place.checksum().crc == build.fingerprint(wanted) == build.fingerprint(found) == crc


def test_packed_directories_too(source, tmp_path):
  scheme, tree = SCHEMES['quantized'], on_host(source, 'quantized')
  packed.write(tmp_path / 'out', CONFIG, tree, provenance={})
  at = sharding.place(abstract(scheme), sharding.make_mesh(data=2, fsdp=2, tensor=2))
  place = stacks.OnDevices(at)
  small_llama.same(packed.load(tmp_path / 'out', CONFIG, scheme, place=place), tree)
  assert place.checksum().crc == build.fingerprint(tree)


def test_a_stack_grows_in_its_own_memory():
  """Nothing is copied but the piece: the buffers of a stack are the same before and after."""
  at = jax.sharding.NamedSharding(sharding.make_mesh(fsdp=8, data=1), jax.sharding.PartitionSpec(None, 'fsdp'))
  place = stacks.OnDevices({'layers': {'w': at}})
  leaves = place.begin({'layers/w': [jax.ShapeDtypeStruct((3, 16, 4), jnp.float32)]})['layers/w']
  piece = np.ones((16, 4), np.float32)
  held = []
  for index in range(3):
    leaves = place.put('layers/w', leaves, index, [piece * index])
    held.append([shard.data.unsafe_buffer_pointer() for shard in leaves[0].addressable_shards])
  assert held[0] == held[1] == held[2]
  np.testing.assert_array_equal(leaves[0], np.arange(3.0)[:, None, None] * piece)


def test_what_arrived_can_be_donated(source):
  """An array on a CPU may share memory with the host's; a step that donates it must not write there twice."""
  scheme = SCHEMES['trained']
  at = sharding.place(abstract(scheme), sharding.make_mesh())
  found = hf.load(source, CONFIG, scheme, place=stacks.OnDevices(at))
  wanted = jax.tree.map(lambda leaf: np.array(leaf) + 1, found)
  moved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0, out_shardings=at)(found)
  for leaf, want in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
    for shard in leaf.addressable_shards:
      np.testing.assert_array_equal(shard.data, want[shard.index])

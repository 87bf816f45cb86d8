"""PEFT runs what `qalora export --format=peft` wrote: LoRA on the dense base, QA-LoRA by its own forward pass."""

import types

import jax
import numpy as np
import peft
from peft.tuners.lora import variants
import pytest
from safetensors import torch as safetensors_torch
import torch
import transformers

from qalora_jax import adapted
from qalora_jax import config as config_lib
from qalora_jax import hf
from qalora_jax import peft as peft_files
from qalora_jax.quant import qtensor

PROMPT = 'Once upon a time, there was a little girl named Lily.'


def test_lora_on_the_dense_base_gives_our_logits(tuned, ours, qalora, assets, tmp_path):
  run = tuned(4, 'lora')
  qalora('export', f'--workdir={run}', '--format=peft', f'--output={tmp_path / "adapter"}')
  # The base in 4 bits as a dense directory; PEFT puts the adapter on it.
  model, variables, tokenizer = ours(run)
  hf.write(tmp_path / 'base', model.config, variables['frozen'], bos=tokenizer.bos, eos=tokenizer.eos)
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype=torch.float32)
  theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / 'adapter')).eval()
  tokens = np.array([[tokenizer.bos, *tokenizer.encode(PROMPT)]])
  with torch.no_grad():
    there = theirs(torch.tensor(tokens)).logits.numpy()
  here = np.asarray(jax.jit(model.apply)(variables, tokens))
  np.testing.assert_allclose(there, here, rtol=0, atol=1e-4 * np.abs(here).max())


def test_a_lora_adapter_of_peft_is_read_with_its_logits(tuned, ours, qalora, assets, tmp_path):
  """The way back: an adapter that PEFT saved."""
  base = transformers.AutoModelForCausalLM.from_pretrained(assets / 'models' / 'babyllama_tok105', dtype=torch.float32)
  torch.manual_seed(0)
  chosen = peft.LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'down_proj'], init_lora_weights=False)
  theirs = peft.get_peft_model(base, chosen).eval()
  theirs.save_pretrained(tmp_path / 'adapter')
  tokens = np.array([[1, 34, 9, 22, 4, 3, 18, 20]])
  with torch.no_grad():
    there = theirs(torch.tensor(tokens)).logits.numpy()
  model = str(assets / 'models' / 'babyllama_tok105')
  loaded = adapted.open_summed(config_lib.default(), model, str(tmp_path / 'adapter'))
  here = np.asarray(jax.jit(loaded.model.apply)(loaded.variables, tokens))
  np.testing.assert_allclose(here, there, rtol=0, atol=1e-4 * np.abs(there).max())


@pytest.mark.parametrize('bits', [4, 3, 2])
def test_qalora_is_what_the_forward_of_peft_computes(tuned, ours, qalora, tmp_path, bits):
  """Its variant runs on GPTQ layers of GPUs alone; its arithmetic is called here with the exported tensors."""
  run = tuned(bits)
  qalora('export', f'--workdir={run}', '--format=peft', f'--output={tmp_path / "adapter"}')
  config = peft.LoraConfig.from_pretrained(tmp_path / 'adapter')
  assert config.use_qalora and config.qalora_group_size == 32
  weights = safetensors_torch.load_file(tmp_path / 'adapter' / peft_files.WEIGHTS)
  name = 'base_model.model.model.layers.2.mlp.down_proj'
  module = types.SimpleNamespace(
    in_features=352,
    training=False,
    lora_A={'default': types.SimpleNamespace(weight=weights[f'{name}.lora_A.weight'])},
    lora_B={'default': types.SimpleNamespace(weight=weights[f'{name}.lora_B.weight'])},
    lora_dropout={'default': torch.nn.Identity()},
    scaling={'default': config.lora_alpha / config.r},
    qalora_group_size={'default': config.qalora_group_size},
  )
  x = torch.tensor(np.random.default_rng(0).normal(size=(1, 5, 352)), dtype=torch.float32)
  update = variants.QALoraLinearVariant.forward(module, 'default', x, torch.zeros(1, 5, 128)).numpy()
  _, variables, _ = ours(run)
  single = lambda tree: jax.tree.map(lambda leaf: leaf[2], tree)
  q = single(variables['frozen']['layers']['mlp']['down_proj']['kernel'])
  node = single(variables['params']['layers']['mlp']['down_proj']['adapter'])
  wanted = x.numpy() @ np.asarray(qtensor.offsets(node.merge(q)) - qtensor.offsets(q)).repeat(32, 0)
  assert np.abs(wanted).max() > 0
  np.testing.assert_allclose(update, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

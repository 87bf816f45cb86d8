"""LoRA, rank 8, on MiniLM-L6 in NF4 with double quantization: MRPC of GLUE.

qalora train --config=configs/qlora_minilm_mrpc.py --workdir=runs/qlora_minilm_mrpc
qalora evaluate --workdir=runs/qlora_minilm_mrpc --tasks=mrpc --config.evaluate.data=glue

Minutes on two cores: about 12.  Expected: see experiments/results/glue.md.
"""

from configs import minilm


def get_config():
  return minilm.finetune('mrpc', 'qlora')

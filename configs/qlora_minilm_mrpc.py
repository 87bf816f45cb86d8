"""LoRA, rank 16, on MiniLM-L6 in NF4 with double quantization: MRPC of GLUE.

qalora train --config=configs/qlora_minilm_mrpc.py --workdir=runs/qlora_minilm_mrpc
qalora evaluate --workdir=runs/qlora_minilm_mrpc --tasks=mrpc --config.evaluate.data=glue
"""

from configs import minilm


def get_config():
  return minilm.finetune('mrpc', 'qlora')

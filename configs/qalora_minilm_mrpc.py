"""QA-LoRA, rank 8, on MiniLM-L6 in 4 bits and groups of 32: MRPC of GLUE.

qalora train --config=configs/qalora_minilm_mrpc.py --workdir=runs/qalora_minilm_mrpc
qalora evaluate --workdir=runs/qalora_minilm_mrpc --tasks=mrpc --config.evaluate.data=glue

Minutes on two cores: about 12.  Expected: see experiments/results/glue.md.
"""

from configs import minilm


def get_config():
  return minilm.finetune('mrpc', 'qalora')

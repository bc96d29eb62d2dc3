python run_glue.py --model_name_or_path bert-base-cased \
  --fp16 --fp16_opt_level O1 \
  --learning_rate 2e-5

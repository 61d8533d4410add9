"""Commands that help ends with, of more than one line; those of the embedded model run as they are."""

TRAIN = (
    "sae-lens-e2e train --model_name embedded --dataset_path embedded --hook_name blocks.3.hook_resid_pre --d_in 64 --d_sae 1024 "
    "--objective warm_e2e_ds --l1_coefficient 1 --context_size 256 --store_batch_size_prompts 4 --train_batch_size_tokens 1024 "
    "--training_tokens 200000 --lr 0.001 --log_to_wandb false --output_path my_sae"
)
FINETUNE = "sae-lens-e2e finetune my_sae --objective e2e_ds --training_tokens 50000 --log_to_wandb false --output_path my_finetuned_sae"

# Sourced by tpu.sh: what can be found out before anything costs money.
# shellcheck shell=bash disable=SC2154  # options and commands are those of tpu.sh

check() {
  check_gcloud
  check_key
  check_extras
  if [[ $config ]]; then check_run; fi
  if [[ $workdir == gs://* ]]; then check_bucket; fi
}

# Newer options are of commands that are installed apart.
check_gcloud() {
  local said
  [[ ! $dry_run && ($tunnel || $provisioning == flex-start || $reservation) ]] || return 0
  said=$(gcloud version 2>/dev/null) || said=''
  [[ $said != *"Google Cloud SDK"* || $said == *alpha* ]] ||
    fail "gcloud has no alpha commands, which this needs: gcloud components install alpha"
}

# --- the key --------------------------------------------------------------------------

readonly SSH_KEY=$HOME/.ssh/google_compute_engine

opens() { ssh-keygen -y -P '' -f "$SSH_KEY" >/dev/null 2>&1; } # without a passphrase

# With several workers gcloud refuses an agent that has other keys but not its own. A key
# without a passphrase needs none.
choose_agent() {
  if opens; then unset SSH_AUTH_SOCK; fi
}

check_key() {
  local tool fingerprint
  [[ ! $dry_run ]] || return 0
  for tool in ssh scp ssh-keygen; do
    command -v "$tool" >/dev/null || fail "$tool is not here, which gcloud reaches the workers with"
  done
  if [[ ! -e $SSH_KEY && ! -e $SSH_KEY.pub ]]; then
    say "making $SSH_KEY, by which gcloud reaches the workers"
    (umask 077 && mkdir -p "$HOME/.ssh")
    ssh-keygen -q -t rsa -N '' -f "$SSH_KEY" </dev/null >&2 || fail "could not make $SSH_KEY (above)"
  fi
  [[ -e $SSH_KEY && -e $SSH_KEY.pub ]] ||
    fail "one of $SSH_KEY and $SSH_KEY.pub is missing: gcloud takes neither; move the other away"
  choose_agent
  ! opens || return 0
  fingerprint=$(ssh-keygen -lf "$SSH_KEY.pub" | cut -d ' ' -f 2) || fail "$SSH_KEY.pub is no key (above)"
  ssh-add -l 2>/dev/null | grep -qF " $fingerprint " ||
    fail "$SSH_KEY needs a passphrase, and no ssh-agent has it: eval \"\$(ssh-agent)\" && ssh-add $SSH_KEY"
}

# pip passes over those that there are not.
check_extras() {
  local extra
  for extra in ${extras//,/ }; do
    grep -q "^ *\"$extra\":" "$ROOT/setup.py" || fail "--extras=$extras: setup.py has no extra $extra"
  done
}

# --- the bucket -----------------------------------------------------------------------

check_bucket() {
  local probe=${workdir%/}/.$name said bucket
  bucket=gs://$(cut -d / -f 3 <<<"$workdir")
  said=$(cloud storage cp --quiet - "$probe" <<<"$name" 2>&1) &&
    said=$(cloud storage rm --quiet "$probe" 2>&1) && return
  case $said in
    *"does not have"* | *denied* | *DENIED* | *"403"*)
      fail "--workdir=$workdir: you may not write to $bucket, or there is none: gcloud storage buckets create $bucket, or ask its owner for roles/storage.objectUser"
      ;;
    *404* | *"not found"* | *"does not exist"*)
      fail "--workdir=$workdir: there is no bucket $bucket: gcloud storage buckets create $bucket"
      ;;
  esac
  say "$said"
  fail "--workdir=$workdir: could not write there (above)"
}

# --- the run --------------------------------------------------------------------------

# Of the commit that is shipped.
committed() { git -C "$ROOT" cat-file -e "HEAD:$1" 2>/dev/null; }

# The workers have the checkout as it was committed, and nothing else of this machine.
check_committed() { # OPTION PATH
  local path=${2#./}
  case $path in
    "$ROOT"/*) fail "$1: name it as seen from the checkout: ${path#"$ROOT"/}" ;;
    /* | \~* | ../*) fail "$1: the workers do not have it; commit it to the checkout, or put it into a bucket" ;;
  esac
  if ! committed "$path"; then
    [[ -e $ROOT/$path || -e $path ]] || fail "$1: there is no $path in the commit that is shipped"
    fail "$1: $path is not in the commit that is shipped: git add and commit it, or put it into a bucket"
  fi
  git -C "$ROOT" diff --quiet HEAD -- "$path" ||
    fail "$1: $path differs from the commit that is shipped: commit it"
}

# KEY=VALUE for the texts that a recipe sets, as recipes here are written.
recipe_settings() { # PATH
  local text base
  text=$(git -C "$ROOT" show "HEAD:$1" 2>/dev/null) || return 0
  base=$(sed -nE 's/.*recipe\("([a-z0-9_]+)".*/\1/p' <<<"$text" | head -n 1)
  [[ -z $base ]] || recipe_settings "configs/$base.py"
  sed -nE "s/^ *[a-z_]+\.([a-z_.]+) *= *[\"']([^\"']*)[\"'].*/\1=\2/p" <<<"$text"
}

# The files, folders, hub names and addresses in a value.
names_in() { # VALUE
  local value=$1
  # A pattern names none.
  while [[ $value =~ regex:\"[^\"]*\" ]]; do value=${value/"${BASH_REMATCH[0]}"/}; done
  grep -oE "gs://[^ ,\"'*()]+|[^ ,:*+()\"']+" <<<"$value" || true
}

check_run() {
  local recipe=${config%%:*} arg line key name_of
  [[ $recipe =~ ^[a-z0-9_]+$ ]] && recipe=configs/$recipe.py
  check_committed "--config=$config" "$recipe"
  check_settings
  while IFS= read -r line; do
    key=${line%%=*}
    case $key in
      model | base | lora.init_from | objective | reward | format_term | behavior.file | data.train | data.eval | data.target)
        while IFS= read -r name_of; do
          [[ -z $name_of ]] || check_name "--config.$line" "$key" "$name_of"
        done < <(names_in "${line#*=}")
        ;;
      wandb_project) [[ $line == *= ]] || check_wandb "--config.$line" ;;
    esac
  done < <({
    recipe_settings "${recipe#./}"
    for arg in "${train[@]}"; do
      [[ $arg != --config.*=* ]] || printf '%s\n' "${arg#--config.}"
    done
  } | awk '{key = $0; sub(/=.*/, "", key); last[key] = $0} END {for (key in last) print last[key]}' | sort)
}

# Names and values of settings, where this machine has an environment to ask.
check_settings() {
  local said
  [[ -f $VENV/.pfjax-ready ]] || return 0
  said=$(cd "$ROOT" && PYTHONPATH=$ROOT "$VENV/bin/python" -c '
from pfjax import cli, train
from pfjax.trainer import config_checks

def main() -> None:
    config_checks.check(cli.config())

cli.run(main)' "${train[@]}" 2>&1) || [[ $said != error:* ]] || fail "${said#error: }"
}

check_name() { # OPTION KEY NAME
  case $3 in
    gs://*)
      cloud storage ls --quiet "$3" >/dev/null 2>&1 || fail "$1: there is no $3, or you may not read it"
      ;;
    pfjax/*) ;; # comes with the package
    /* | \~* | ./* | ../* | *.jsonl | *.json | *.parquet | *.csv | *.txt | *.toml | *.py | *.gguf)
      check_committed "$1" "$3"
      ;;
    */*/*) check_committed "$1" "$3" ;;
    *)
      if [[ -d $ROOT/$3 ]]; then
        case $2 in
          model | base | lora.init_from | reward) check_committed "$1" "$3" ;;
        esac
      elif [[ $3 == */* ]]; then
        case $2 in
          data.*) check_hub "$1" datasets "$3" ;;
          *) check_hub "$1" models "$3" ;;
        esac
      fi
      ;;
  esac
}

# Whether the hub gives the workers what a name stands for, with the token they will have.
check_hub() { # OPTION KIND NAME
  local status id=${3%%@*} hub=${hf_endpoint:-https://huggingface.co} page
  page=$hub/$id
  [[ $2 != datasets ]] || page=$hub/datasets/$id
  [[ ! $dry_run ]] && command -v curl >/dev/null || return 0
  # The token by a pipe: arguments can be listed.
  status=$(curl --silent --location --max-time 20 --output /dev/null --write-out '%{http_code}' \
    --config - "$hub/api/$2/$id/auth-check" \
    <<<"${hf_token:+header = \"Authorization: Bearer $hf_token\"}") || status=''
  case $status in
    200) ;;
    401 | 403 | 404)
      if [[ $hf_token ]]; then
        fail "$1: $hub does not give $id to the owner of HF_TOKEN: accept its terms at $page, or mend the name"
      fi
      fail "$1: $hub gives $id only to who has accepted its terms: do so at $page, and --env=HF_TOKEN; or mend the name"
      ;;
    *) say "note: $hub did not say whether the workers will be given $id" ;;
  esac
}

check_wandb() { # OPTION
  [[ ,$extras, == *,wandb,* ]] || fail "$1: the workers need a package for it: --extras=wandb"
  [[ $assignments =~ (^|$'\n')WANDB_(API_KEY|MODE)= ]] ||
    fail "$1: nobody is logged in on the workers: --env=WANDB_API_KEY, or --env=WANDB_MODE=offline"
}

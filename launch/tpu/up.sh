# Sourced by tpu.sh: the command that trains to the end, whatever happens to the TPU.
# shellcheck shell=bash disable=SC2034,SC2154  # options and commands are those of tpu.sh

# What the workers say of the run together: running, ended N, lost, or nothing when not
# all can be reached.
run_state() {
  local out
  out=$(on_workers all bash pfjax-current/launch/worker.sh status 2>/dev/null) || return 0
  if [[ $dry_run ]]; then
    echo 'ended 0'
    return
  fi
  # One that was told to stop takes the others with it. 143: told before it could save.
  # 76 is said by one that has lost another, of which this may be all that is left.
  awk '/: lost$/ {lost = 1}
       /: running$/ {running = 1}
       /: ended [0-9]+$/ {ended = 1
         if ($NF == 75 || $NF == 143) told = 1
         else if ($NF == 76) alone = 1; else if ($NF != 0) bad = $NF}
       END {if (lost) print "lost"
            else if (bad && !told) print "ended", bad
            else if (running) print "running"
            else if (told || alone) print "ended", 75
            else if (ended) print "ended", 0}' <<<"$out"
}

# Whether the TPU has been taken away.
gone=''

tell_gone() { # STATE
  gone=yes
  case $provisioning in
    flex-start) say "$name is $1: its time is over (--max-run=$max_run)" ;;
    calendar) say "$name is $1: its reservation is over" ;;
    *) say "$name is $1: preempted" ;;
  esac
}

# Whether the TPU is being taken away: what runs on it notices before its state does.
preempted() {
  local now
  for _ in 1 2 3; do
    sleep "$poll"
    now=$(state ACTIVE) || continue
    if [[ $now != ACTIVE ]]; then
      tell_gone "$now"
      return
    fi
  done
  return 1
}

# Returns when the run has ended well, 75 when it has to begin again, or 124 when its time
# is over, after a save.
watch() { # END, LIMIT
  local found now silent=0
  while true; do
    if ((SECONDS >= $1)); then
      say "the time is over ($2): asking the run to save and end"
      (stop) >&2 || true
      [[ $(run_state) != 'ended 0' ]] || return 0
      return "$TIMED_OUT"
    fi
    found=$(run_state)
    case $found in
      'ended 0') return 0 ;;
      "ended $INTERRUPTED")
        say "the run was interrupted"
        preempted || true
        return "$INTERRUPTED"
        ;;
      ended*)
        ! preempted || return "$INTERRUPTED"
        (worker=0 follow='' && logs) >&2 || true
        fail "the run failed with exit status ${found#ended } (log of worker 0 above, of all in $workdir/logs)"
        ;;
      lost)
        # The others wait for the worker that began anew; a new TPU is simpler.
        say "a worker of $name has lost the run"
        delete
        return "$INTERRUPTED"
        ;;
      running) silent=0 ;;
    esac
    now=$(state ACTIVE) || now='(unknown)'
    case $now in
      ACTIVE)
        # When gcloud cannot be reached either, the workers are not to blame.
        [[ $found ]] || ((++silent))
        ((silent < 10)) || fail "not all workers of $name have answered for $silent looks"
        ;;
      '(unknown)') ;;
      *)
        tell_gone "$now"
        return "$INTERRUPTED"
        ;;
    esac
    sleep "$poll"
  done
}

# Whether a run goes on, or soon will, that does not need this script.
detached=''
# Whether the TPU waits for a person to mend its set-up.
held=''

# Keeps a TPU that was waited for, so that what its set-up failed on can be mended.
hold() {
  local now end=$((SECONDS + hold)) step
  # Only this call's own TPU is given back without being told to.
  [[ $created && ! $keep ]] && ((hold)) || return 0
  held=yes detached=''
  # Who has lost the terminal has been promised the time as well.
  trap '' HUP
  say "$name is kept for $hold s (--hold), costs money meanwhile, and is then given back. To go on: Ctrl-C, mend the cause, and the same command. To give it back now: Ctrl-C, and $(ending)"
  while ((SECONDS < end)); do
    step=$((end - SECONDS))
    sleep "$((poll < step ? poll : step))"
    now=$(state ACTIVE) || continue
    [[ $now == ACTIVE ]] || break
  done
  held=''
  say "nobody has gone on with $name"
}

# The run has ended, or its time has.
finish() {
  created='' detached=''
  if [[ $keep ]]; then costs "is kept (--keep)"; else delete; fi
}

up() {
  local attempt status since left limit own used=0
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    ((attempt == 0)) || say "beginning again, from the last checkpoint ($attempt of at most $restarts)"
    detached='' gone=''
    create
    detached=yes
    since=$SECONDS status=0
    left=$((max_hours * 3600 - used)) limit=--max-hours=$max_hours
    if [[ $provisioning == flex-start ]]; then
      # Before it is taken away, so that the run has time to save.
      own=$((max_run_s - (max_run_s < 7200 ? max_run_s / 8 : 900)))
      if ((own < left)); then left=$own limit=--max-run=$max_run; fi
    fi
    # fail ends only the shell of its own that this is.
    (setup && run) || status=$?
    if ((status == 0)); then
      say "running, for at most $left s ($limit); it goes on if this stops. To look: bash launch/tpu.sh logs$(printf ' %q' "--name=$name" "${where[@]:1}")"
      watch "$((since + left))" "$limit" || status=$?
    elif preempted; then
      status=$INTERRUPTED
    else
      hold
      fail "could not start the run on $name"
    fi
    if ((status == 0)); then
      say "the run has ended"
      finish
      return
    fi
    ((used += SECONDS - since)) || true
    # What comes to its own end does so at the price that was agreed on; more is for a
    # person to ask for.
    if [[ $gone && $provisioning =~ ^(flex-start|calendar)$ ]] || ((status == TIMED_OUT || used >= max_hours * 3600)); then
      finish
      say "error: the run is not at its end ($used s with a TPU); the same command goes on from the last checkpoint"
      exit "$INTERRUPTED"
    fi
  done
  fail "the run was interrupted more than $restarts times (--restarts)"
}

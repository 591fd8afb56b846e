"""Decides what the next step computes: a list of (sequence, number of tokens). There is no prefill or decode phase.

Running sequences go first, oldest first, each with all the tokens it still lacks (a decode lacks one) up to the step's
token budget; then waiting ones are admitted, a prompt only as a whole: all its blocks at once, with a watermark left
over, so that preemption stays rare. Who is next in line, `waiting` says; a share of seats and blocks is kept for keys
that run on less than their equal part (`LineLimits.fair_reserve`), so that one that floods the engine does not make a
newcomer wait for the end of its answers. When a running sequence finds no block, the youngest gives up all of its own
(LIFO) and is computed again later: its full blocks stay in the cache while nobody needs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from replicas.engine.blocks import BlockPool
from replicas.engine.deadlines import Deadlines, too_late
from replicas.engine.pace import Pace
from replicas.engine.sequence import Group, Sequence
from replicas.engine.turn import Turn, take_turns
from replicas.engine.waiting import OUTPUT_WEIGHT, LineLimits, WaitingLine
from replicas.protocol import GenerateRequest


@dataclass(slots=True)
class Step:
    """items: (sequence, tokens to compute), never empty in a step that is run.

    offloads, fetches: (block, host slot) and (host slot, block) to copy, in this order, before anything else.
    copies: (source, destination) blocks whose contents must be copied then, before the step writes anything.
    preempted: sequences that lost their place in the running set.
    hopeless: waiting ones that were turned away, because they cannot meet their deadlines any more.
    """

    items: list[tuple[Sequence, int]] = field(default_factory=list)
    offloads: list[tuple[int, int]] = field(default_factory=list)
    fetches: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    hopeless: list[Sequence] = field(default_factory=list)
    num_prefill_tokens: int = 0


class Scheduler:
    """tokens_per_step: what one sequence may bring in a step, at most: more than one with drafts."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        watermark: float,
        limits: LineLimits | None = None,
        tokens_per_step: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.clock = clock
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.tokens_per_step = tokens_per_step
        self.watermark_blocks = int(watermark * pool.num_blocks)
        self.waiting: WaitingLine[Sequence] = WaitingLine(limits or LineLimits())
        self.deadlines = Deadlines()
        self._reserved_seats = self.waiting.limits.reserved(max_num_seqs)
        self._reserved_blocks = self.waiting.limits.reserved(pool.num_blocks)
        self._pace = Pace()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.host_hits = 0  # of prefix_hits, tokens whose blocks were fetched from host memory

    # ---------------------------------------------------------------- getting in line

    def check(self, request: GenerateRequest) -> None:
        """QueueFull or DeadlineExceeded where there is no use in adding `request`."""
        if request.deadline_s is not None and not request.deadline_s > 0:  # NaN, too
            raise too_late()
        self.waiting.check(request, self.clock())

    def add(self, seq: Sequence, request: GenerateRequest) -> None:
        """Put the first sequence of a request that `check` let through in line; its queued_tokens are known."""
        now = self.clock()
        self.waiting.add(seq, request, seq.queued_tokens, now)
        if request.deadline_s is not None:
            self.deadlines.add(request.request_id, now + request.deadline_s)

    def take_late(self) -> list[str]:
        """Ids of the requests whose deadline has come, wherever they are; the caller drops their sequences."""
        return self.deadlines.take_late(self.clock())

    def record(self, seconds: float, step: Step) -> None:
        """How long `step` took, from which is learnt what is out of reach and how many seats pay."""
        self._pace.record(seconds, len(step.items), step.num_prefill_tokens, self.max_num_batched_tokens)

    def tokens_at_hand(self) -> int:
        """About how many tokens the coming step has without drafts."""
        lacking = sum(seq.num_tokens - seq.num_computed for seq in self.running)
        if self.waiting and len(self.running) < self.max_num_seqs:
            return self.max_num_batched_tokens
        return min(lacking, self.max_num_batched_tokens)

    # ---------------------------------------------------------------- the step

    def schedule(self) -> Step:
        step, now = Step(), self.clock()
        self._make_way(step, now)
        gone = len(step.preempted)
        head = self.waiting.head(now)
        if head is not None and not self._could_admit(head):
            head = None
        turn = take_turns(self.running, head, self.waiting, self._pace, self.max_num_batched_tokens, now)
        budget = self._extend_running(step, self.max_num_batched_tokens, turn)
        if len(step.preempted) == gone:  # else the victim's blocks would go straight back to it
            self._admit_waiting(step, budget, turn)
        if not step.items and turn.paused:  # whom they stood back for turned out to be hopeless
            self._extend_running(step, self.max_num_batched_tokens, Turn())
        if self.pool.host is not None:
            step.offloads, step.fetches = self.pool.host.take_transfers()
        return step

    def _could_admit(self, seq: Sequence) -> bool:
        if len(self.running) >= self.max_num_seqs:
            return False
        needed = -(-seq.num_tokens // self.pool.block_size)
        room = self.pool.num_free - self.watermark_blocks
        return needed <= room or needed - sum(block is not None for block in self._find(seq)) <= room

    def _make_way(self, step: Step, now: float) -> None:
        """Where seats or blocks are wanting, the youngest of a key that floods leaves its own to one that does not.

        It goes back to the head of its own line, and to its blocks, if nobody needed them meanwhile. One a step, and
        before anything is put into the step: what a step holds is never taken back.
        """
        head = self.waiting.head(now)
        if head is None or self.waiting.in_front(head) or not self.waiting.shared(now) or self._could_admit(head):
            return
        if self.waiting.floods(head.account, now):
            return
        for seq in reversed(self.running):
            account = seq.account
            if account.priority >= head.account.priority and account.cost > head.account.cost:
                if self.waiting.floods(account, now):
                    self._stand_down(seq, step, now)
                    return

    def _stand_down(self, seq: Sequence, step: Step, now: float) -> None:
        self.running.remove(seq)
        self._give_up_place(seq, step)
        self.waiting.put_back(seq, now)

    def _extend_running(self, step: Step, budget: int, turn: Turn) -> int:
        now = self.clock()
        i = 0
        while i < len(self.running) and budget > 0:
            seq = self.running[i]
            lacking = min(seq.num_tokens - seq.num_computed, budget)
            allowed = turn.limit(seq, lacking)
            if allowed == 0:
                i += 1
                continue
            turn.spend(seq, allowed)
            count = self._count(seq, budget, behind=len(self.running) - i - 1) if allowed == lacking else allowed
            count = self._make_room(step, i, count, turn, now)
            if count == 0:  # it gave up its own place, and another stands there now
                continue
            self._extend(step, seq, count, now)
            budget -= count
            i += 1
        return budget

    def _make_room(self, step: Step, i: int, count: int, turn: Turn, now: float) -> int:
        """Blocks for `count` tokens of running[i], others' if need be: how many of them it computes now.

        0: it is the one that gave up its place. Victims come from behind, so nothing that this step already holds is
        ever taken back.
        """
        seq = self.running[i]
        while not self._can_extend(seq, count):
            if seq.drafts:  # a guess is never worth somebody's place
                count, seq.drafts = count - len(seq.drafts), []
            elif not self._reclaim_from_waiting(keep=seq) and self._preempt(step, i, turn, now) is seq:
                return 0
        return count

    def _count(self, seq: Sequence, budget: int, behind: int) -> int:
        """Tokens of `seq` to compute: those it lacks, and its drafts as far as they leave one each to those behind."""
        lacking = seq.num_tokens - seq.num_computed
        if seq.drafts:
            del seq.drafts[max(budget - lacking - behind, 0) :]
        return min(lacking + len(seq.drafts), budget)

    def _admit_waiting(self, step: Step, budget: int, turn: Turn) -> None:
        now = self.clock() if self.waiting else 0.0
        while budget > 0 and (seq := self.waiting.head(now)) is not None:
            in_front = self.waiting.in_front(seq)
            greedy = not in_front and self.waiting.floods(seq.account, now)
            if greedy and turn.closed and step.items:
                return
            if self._is_hopeless(seq, now):
                self.waiting.remove(seq)
                step.hopeless.append(seq)
                continue
            if len(self.running) >= self.max_num_seqs - (self._reserved_seats if greedy else 0):
                return
            if turn.limit(seq, budget) == 0:
                return
            if not self._allocate_prompt(seq, self._reserved_blocks if greedy else 0, now):
                if self.running or not self._reclaim_from_waiting(keep=seq):
                    return
                continue
            self.waiting.take(seq, now)
            self.running.append(seq)
            count = turn.limit(seq, min(seq.num_tokens - seq.num_computed, budget))
            self._extend(step, seq, count, now)
            turn.spend(seq, count)
            budget -= count

    def _is_hopeless(self, seq: Sequence, now: float) -> bool:
        """Whether `seq` would be too late even if every step to come were as fast as the fastest so far.

        Asked of the head of the line only: nobody is turned away for what others may yet cost.
        """
        deadline = self.deadlines.get(seq.request_id)
        if deadline is None or seq.admitted:
            return False
        left = deadline - now
        if self._least_s(seq, seq.queued_tokens) <= left:
            return False
        return self._least_s(seq, seq.num_tokens - self.cached_tokens(seq)) > left

    def _least_s(self, seq: Sequence, tokens: int) -> float:
        """Seconds to compute `tokens` of a prompt and the fewest outputs allowed, at the least."""
        steps = -(-max(seq.sampling.min_tokens, 1) // self.tokens_per_step)
        return self._pace.least_s(tokens, steps, self.max_num_batched_tokens)

    def cached_tokens(self, seq: Sequence) -> int:
        """Leading tokens of a sequence without blocks that need not be computed if it is admitted now."""
        return len(self._find(seq)) * self.pool.block_size

    def _find(self, seq: Sequence) -> list[int | None]:
        """Cached blocks for a sequence that has none: an id each, or None for one to be fetched from host memory.

        One token at least is computed: its logits are sampled from.
        """
        if not self.pool.enable_prefix_caching:
            return []
        size = self.pool.block_size
        found = self.pool.match(seq.root, seq.extend_hashes(size)[: (seq.num_tokens - 1) // size], seq.tokens)
        if self.pool.host is not None and None in found:
            here = found.index(None)
            if not self.pool.host.rule.pays(found.count(None), (len(found) - here) * size):
                del found[here:]
        return found

    def _allocate_prompt(self, seq: Sequence, reserved: int, now: float) -> bool:
        """All blocks that `seq` needs to compute its known tokens, cached ones first; False leaves all as it was."""
        size = self.pool.block_size
        found = self._find(seq) if not seq.blocks else []
        here = [block for block in found if block is not None]
        fresh = -(-seq.num_tokens // size) - len(seq.blocks) - len(found)
        needed = fresh + len(found) - len(here) + self._copies_needed(seq)
        free = self.pool.num_free - sum(self.pool.refs(b) == 0 for b in here)
        if needed > free - (self.watermark_blocks + reserved if self.running else 0):
            return False
        seq.blocks += self.pool.take(found, seq.root, seq.hashes[: len(found)], seq.tokens)
        seq.num_computed = max(seq.num_computed, len(found) * size)
        seq.stored = max(seq.stored, len(found))
        seq.blocks += self.pool.allocate(fresh)
        if not seq.admitted:
            seq.admitted = True
            seq.num_cached = seq.num_computed
            seq.queued_tokens = seq.num_tokens - seq.num_computed  # more may be cached now than when it was added
            self.waiting.charge(seq.account, seq.queued_tokens, now)
            if seq.index == 0:
                self.prefix_queries += seq.num_tokens
                self.prefix_hits += seq.num_cached
                self.host_hits += (len(found) - len(here)) * size
        return True

    def _extend(self, step: Step, seq: Sequence, count: int, now: float) -> None:
        """Put `count` tokens of `seq` into the step: blocks for them, private ones where they write."""
        size = self.pool.block_size
        missing = -(-(seq.num_computed + count) // size) - len(seq.blocks)
        if missing > 0:
            seq.blocks += self.pool.allocate(missing)
        first = seq.num_computed // size
        if self.pool.is_shared(seq.blocks[first]):
            # Only the first block written can be shared: what follows it was allocated for this sequence alone.
            [fresh] = self.pool.allocate(1)
            step.copies.append((seq.blocks[first], fresh))
            self.pool.release([seq.blocks[first]])
            seq.blocks[first] = fresh
            seq.dirty_from = min(seq.dirty_from, first)
        step.items.append((seq, count))
        if seq.logits_wanted(count):
            self.waiting.charge(seq.account, OUTPUT_WEIGHT, now)  # computing one's last token brings the next
        if seq.num_computed + 1 < seq.num_tokens:
            step.num_prefill_tokens += count
        self._store_full_blocks(seq, min(seq.num_computed + count, seq.num_known))

    def _store_full_blocks(self, seq: Sequence, num_known: int) -> None:
        """Offer blocks to the cache as soon as a step that fills them is scheduled.

        Every attention backend writes a whole step's keys and values before any query reads, so a sequence admitted
        later into the same step may already share them.
        """
        size = self.pool.block_size
        full = num_known // size
        if full > seq.stored and self.pool.enable_prefix_caching:
            hashes = seq.extend_hashes(size)
            parent = hashes[seq.stored - 1] if seq.stored else seq.root
            tokens = seq.tokens[seq.stored * size : full * size]
            self.pool.store(seq.blocks[seq.stored : full], parent, hashes[seq.stored : full], tokens)
            seq.stored = full

    def _copies_needed(self, seq: Sequence) -> int:
        first = seq.num_computed // self.pool.block_size
        return int(first < len(seq.blocks) and self.pool.is_shared(seq.blocks[first]))

    def _can_extend(self, seq: Sequence, count: int) -> bool:
        blocks = -(-(seq.num_computed + count) // self.pool.block_size)
        return max(blocks - len(seq.blocks), 0) + self._copies_needed(seq) <= self.pool.num_free

    # ---------------------------------------------------------------- giving back

    def _preempt(self, step: Step, first: int, turn: Turn, now: float) -> Sequence:
        """The youngest of a key that floods, else the youngest, of running[first:], gives up its place."""
        for victim in reversed(self.running[first:]):
            if victim.account in turn.flooding:
                self._stand_down(victim, step, now)
                return victim
        victim = self.running.pop()
        self._give_up_place(victim, step)
        self.waiting.push_front(victim)
        return victim

    def _give_up_place(self, victim: Sequence, step: Step) -> None:
        self.pool.release(victim.forget_blocks())
        victim.account.seats -= 1
        step.preempted.append(victim)
        self.num_preemptions += 1

    def _reclaim_from_waiting(self, keep: Sequence) -> bool:
        """Forks wait with their parent's blocks in hand; the last in line gives them up when others cannot go on."""
        for seq in self.waiting.holders():
            if seq.blocks and seq is not keep:
                self.pool.release(seq.forget_blocks())
                return True
        return False

    def fork(self, group: Group, parent: Sequence) -> None:
        """Let the other choices continue from `parent`'s computed prompt: all blocks shared, copied on first write.

        They compute the prompt's last token once more, to have logits of their own to sample from.
        """
        num_blocks = -(-parent.num_prompt // self.pool.block_size)
        for seq in reversed(group.unforked):
            seq.blocks = parent.blocks[:num_blocks]
            self.pool.acquire(seq.blocks)
            seq.hashes = parent.hashes[: parent.num_prompt // self.pool.block_size]
            seq.num_computed = parent.num_prompt - 1
            seq.stored = parent.num_prompt // self.pool.block_size
            seq.admitted = True
            seq.account = parent.account
            self.waiting.push_front(seq)
        group.unforked = []

    def drop(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence, wherever it is."""
        if seq in self.running:
            self.running.remove(seq)
            seq.account.seats -= 1
        else:
            self.waiting.remove(seq)
        self.pool.release(seq.forget_blocks())

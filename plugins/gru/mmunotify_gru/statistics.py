"""What the driver counts, under the names of the original (`gru_statistics`)."""

from __future__ import annotations

import attrs


@attrs.define(slots=True)
class Statistics:
    """The counters of one address space (of a whole GRU: the sum, `Gru.statistics`)."""

    gts_alloc: int = 0
    gts_free: int = 0
    gms_alloc: int = 0
    gms_free: int = 0
    assign_context: int = 0
    assign_context_failed: int = 0
    """Attempts that found no chiplet with room."""
    free_context: int = 0
    load_user_context: int = 0
    steal_user_context: int = 0
    """Contexts of anybody that this address space has taken."""
    steal_context_failed: int = 0
    nopfn: int = 0
    """Uses of a context that was not loaded."""
    asid_new: int = 0
    asid_next: int = 0
    """Runs of free ASIDs that were used up."""
    asid_wrap: int = 0
    asid_reuse: int = 0
    intr: int = 0
    intr_tfh: int = 0
    intr_spurious: int = 0
    call_os: int = 0
    call_os_wait_queue: int = 0
    """Waits of a fault for a section that covers its page."""
    user_flush_tlb: int = 0
    user_unload_context: int = 0
    user_exception: int = 0
    set_context_option: int = 0
    check_context_unload: int = 0
    """Contexts that were unloaded because their task runs elsewhere now."""
    tlb_dropin: int = 0
    tlb_preload_page: int = 0
    tlb_dropin_fail_no_asid: int = 0
    tlb_dropin_fail_upm: int = 0
    tlb_dropin_fail_invalid: int = 0
    tlb_dropin_fail_range_active: int = 0
    tlb_dropin_fail_idle: int = 0
    tlb_dropin_fail_fmm: int = 0
    tlb_dropin_fail_no_exception: int = 0
    mmu_invalidate_range: int = 0
    flush_tlb: int = 0
    flush_tlb_gru: int = 0
    """Chiplets that a range was flushed on, at once or later."""
    flush_tlb_gru_tgh: int = 0
    """Operations of a TLB gate handle: what batching is about."""
    flush_tlb_gru_zero_asid: int = 0
    """Flushes that were put off: nothing was loaded, and the ASID is not used again."""
    mesq_send: int = 0
    mesq_send_failed: int = 0
    mesq_receive: int = 0
    mesq_receive_none: int = 0
    mesq_noop: int = 0
    mesq_send_lb_overflow: int = 0
    mesq_send_qlimit_reached: int = 0
    mesq_send_amo_nacked: int = 0
    mesq_send_put_nacked: int = 0
    mesq_page_overflow: int = 0
    mesq_qf_locked: int = 0
    mesq_qf_switch_head_failed: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to count, in this order."""
        return {name: getattr(self, name) for name in NAMES}

    def add(self, other: Statistics) -> None:
        """Count what somebody else has counted as well."""
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))


NAMES = tuple(field.name for field in attrs.fields(Statistics))

/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * The time that a lease is compared with: CLOCK_BOOTTIME, but not asked for by every packet, which would cost more than all the rest.
 *
 * Each processor keeps the last reading. It serves again only while all of this holds:
 *   1. jiffies have not moved since: it is less than a tick old, as long as somebody counts ticks. Who counts them may be held up (a
 *      virtual processor without time on its host); then, from Linux 5.18 on, any other processor whose own tick has found jiffies
 *      unmoved for the fifth time counts them itself (MAX_STALLED_JIFFIES in kernel/time/tick-sched.c). So a reading is at most
 *      seven ticks old, `config.slack`; user space sets that to 0, and every packet reads the clock, where this is not known to hold;
 *   2. the lease ends more than `slack` after it. The last moments of a lease that is not renewed are measured by the clock itself: it
 *      ends on the nanosecond;
 *   3. it has served fewer than CLOCK_USES frames. A machine that stood still as a whole (a virtual machine that was paused, a
 *      suspension) may go on in the middle of a tick; no reading can be so young that this could not have happened since. So no more
 *      frames may have been judged by one reading than drivers gather after they were judged and before they are sent anyway.
 * That a lease has ended is certain with any reading: time does not go back.
 */
#ifndef KOMAINU_CLOCK_H
#define KOMAINU_CLOCK_H

#include "verdict.h"

/* DEV_MAP_BULK_SIZE in <net/xdp.h>; those of drivers are no smaller. */
#define CLOCK_USES 16

/* The time, to be compared with `until`. */
INLINE u64 time_before(const struct config *c, struct tally *t, u64 until)
{
    struct clock *k = &t->clock;
    u64 ticks = jiffies(), last = k->now;
    if (last >= until)
        return last;
    if (likely(ticks == k->ticks && k->uses < CLOCK_USES && until - last > c->slack && c->slack)) {
        k->uses++;
        return last;
    }
    /* Ticks first: those that end meanwhile make this reading old, not the next one young. */
    k->now = boot_ns();
    k->ticks = ticks;
    k->uses = 1;
    return k->now;
}

#endif

/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * What becomes of a frame, and its counters:
 *   pass   not ours: the host has it, untouched
 *   up     ours, but the engine's business: untouched to user space
 *   drop   with a reason
 *   leave  rewritten, by one of the ports
 */
#ifndef KOMAINU_VERDICT_H
#define KOMAINU_VERDICT_H

#include "maps.h"

#ifdef KOMAINU_XDP
typedef struct xdp_md context;
#define VERDICT_PASS XDP_PASS
#define VERDICT_DROP XDP_DROP
#else
typedef struct __sk_buff context;
/* The next program or filter, and without one the stack. TC_ACT_SHOT and TCX_DROP are the same number. */
#define VERDICT_PASS (-1)
#define VERDICT_DROP 2
#endif

/* In the order of drops.rs: those that are counted here. */
enum drop {
    DROP_NO_LEASE = 0,
    DROP_NO_SERVICE = 1,
    DROP_NO_BACKEND = 2,
    DROP_NO_BINDING = 4,
    DROP_NO_ROUTE = 8,
    DROP_OFF_LINK = 9,
    DROP_LINK_BROADCAST = 27,
    DROP_PROTOCOL = 28,
};

/* In the order of engine/counters.rs. */
enum event {
    EVENT_FORWARDED = 1,
    EVENT_RETURNED = 2,
    EVENT_ARP_ANSWERED = 5,
    EVENT_ND_ANSWERED = 6,
};

/* In the order of abi.rs `Up`. */
enum up {
    UP_MALFORMED,
    UP_FRAGMENT,
    UP_OPTIONS,
    UP_ICMP,
    UP_VLAN,
    UP_DISCOVERY,
    UP_CLAIM,
    UP_TTL,
    UP_TOO_BIG,
    UP_NEIGHBOUR,
    UP_SEGMENT,
    UP_FLOW,
    UP_UNSTEADY,
    UP_DEAD_BACKEND,
    UP_ROOM,
    UP_UNREADY,
    UP_NOTE,
};

INLINE struct tally *own_tally(void)
{
    u32 cpu = cpu_id();
    return map_lookup(&tally, &cpu);
}

/* What is known of a port, its number bounded once more where the verifier sees it. */
INLINE const struct port *port_of(const struct config *c, u32 number)
{
    OPAQUE(number);
    return &c->ports[number & 1];
}

static __attribute__((noinline)) int drop(u32 reason)
{
    struct tally *t = own_tally();
    if (t && reason < TALLY_DROPS)
        t->drops[reason]++;
    return VERDICT_DROP;
}

static __attribute__((noinline)) int up(context *ctx, u32 in, u32 why)
{
    struct tally *t = own_tally();
    if (t && why < TALLY_UP)
        t->up[why]++;
#ifdef KOMAINU_XDP
    /* The packet socket of user space is behind us, and sees what passes. */
    (void)ctx;
    (void)in;
    return VERDICT_PASS;
#else
    /* It is before us, and has not looked: user space listens on a device of its own. */
    (void)ctx;
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    u32 ifindex = c ? port_of(c, in)->up : 0;
    return ifindex ? redirect(ifindex, BPF_F_INGRESS) : VERDICT_DROP;
#endif
}

/* The rewritten frame leaves by `out`. */
INLINE int leave(const struct config *c, u32 in, u32 out)
{
#ifdef KOMAINU_XDP
    if (out == in)
        return XDP_TX;
#else
    (void)in;
#endif
    return redirect(port_of(c, out)->ifindex, 0);
}

INLINE void count_event(struct tally *t, u32 event)
{
    t->events[event]++;
}

#endif

/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * Kept flows: flows of full NAT that are made here and whose states are kept here (FLOW_KEPT). The engine learns of both by the ring
 * `news`, ages and forgets them; it alone takes them out of the maps.
 *
 *   - A port below SNAT_PORT_UPPER belongs to whoever first puts it into `bound` for its backend, program or engine; those above are
 *     the engine's. The candidates are those of `src/engine/nat.rs`, so that another node derives the same.
 *   - So many flows are made as user space has granted the processor: how many it has room for, of them half-open ones. Beyond that,
 *     in a flood, first packets go up as if nothing were made here.
 *   - Nothing is written that is not told: without room for the news the packet goes up.
 *   - State, flags and port of a flow are one word, changed by compare and exchange. Its version tells user space which of two pieces of
 *     news of different processors is the later one.
 *   - The backend's side has a copy of FLOW_STEADY, so that plain answers need not look for the client's side.
 */
#ifndef KOMAINU_MAKE_H
#define KOMAINU_MAKE_H

#include "select.h"

/* Ports that are tried before a first packet goes up. */
#define MAKE_PROBES 16
/* Tries to change a flow that others change too. */
#define CHANGE_TRIES 4
#define EEXIST 17

#define WORD_FLAGS(word) ((word) & 0xff)
#define WORD_PROGRESS(word) ((word) >> 8 & 0xff)

INLINE u32 *word_of(struct flow *f)
{
    return (u32 *)&f->flags;
}

/* A flow's word with another state: the next version. */
INLINE u32 word_with(u32 word, u32 progress)
{
    u32 flags = (WORD_FLAGS(word) & ~FLOW_STEADY) + (1 << FLOW_VERSION_SHIFT);
    if (is_steady(progress))
        flags |= FLOW_STEADY;
    return (word & 0xffff0000) | progress << 8 | (flags & 0xff);
}

/* By words of four bytes: keys on the stack are aligned to no more. */
INLINE void copy_address(u8 *to, const void *from)
{
    const u32 *words = from;
    ((u32 *)to)[0] = words[0];
    ((u32 *)to)[1] = words[1];
    ((u32 *)to)[2] = words[2];
    ((u32 *)to)[3] = words[3];
}

/* Hands over a piece of news that is complete. The flow has been written: a barrier, so a sleeper is not overlooked. */
INLINE void tell(const struct config *c, struct news *n)
{
    ring_submit(n, READ_ONCE(c->flags) & CONFIG_WAKE ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

/* Room for news of a flow that is made, if one may be. */
INLINE struct news *may_make(const struct config *c, const struct tally *t)
{
    u32 cpu = cpu_id();
    struct grant *g = map_lookup(&grants, &cpu);
    if (!g || t->made >= READ_ONCE(g->most) || READ_ONCE(c->flags) & CONFIG_FROZEN)
        return 0;
    return ring_reserve(&news, sizeof(struct news), 0);
}

/* Lower ports of a SNAT address. */
#define LOWER_PORTS (SNAT_PORT_UPPER - SNAT_PORT_MIN)

/* The first candidate: its address, and the number of its port. 0: there is no such address. */
INLINE int first_candidate(const struct packet *p, const struct record *r, const struct backend *b, u8 *address, u32 *port)
{
    u32 hash = is_mapped((const u32 *)r->snat) ? hash_snat(HASH_SEED, 0, p->src, p->src_port, r->id, b->id)
                                               : hash_snat(HASH_SEED, 1, p->src, p->src_port, r->id, b->id);
    if (likely(r->snat_count == 1)) {
        copy_address(address, r->snat);
        *port = hash_scale(hash, LOWER_PORTS);
        return 1;
    }
    u32 first = hash_scale(hash, r->snat_count * LOWER_PORTS), table = r->snats;
    void *lines = map_lookup(&slots, &table);
    if (!lines)
        return 0;
    u32 slot = first / LOWER_PORTS * SNAT_WORDS, number = slot / SLOTS_PER_LINE;
    struct slot_line *line = map_lookup(lines, &number);
    if (!line)
        return 0;
    slot %= SLOTS_PER_LINE;
    OPAQUE(slot);
    copy_address(address, &line->slots[slot & (SLOTS_PER_LINE - SNAT_WORDS)]);
    *port = first % LOWER_PORTS;
    return 1;
}

INLINE u32 next_port(u32 at)
{
    return at + 1 < LOWER_PORTS ? at + 1 : 0;
}

/* The name of a flow's answers, but for the port: the number of that which is to be tried first is in `port`. 0: there is none. */
INLINE int name_answers(struct scratch *s, const struct packet *p, const struct backend *b, const struct record *r, u32 *port)
{
    copy_address(s->answers.backend, b->address);
    s->answers.backend_port = b->port;
    s->answers.protocol = p->protocol;
    return first_candidate(p, r, b, s->answers.snat, port);
}

INLINE int is_address(const u8 *a, const u8 *b)
{
    const u64 *x = (const u64 *)a, *y = (const u64 *)b;
    return x[0] == y[0] && x[1] == y[1];
}

INLINE void describe(struct news *n, const struct flow_key *name, const struct flow *f, u32 word, u64 now, u32 kind)
{
    n->flow = *name;
    n->now = now;
    n->backend = f->backend;
    n->flags = (u8)WORD_FLAGS(word);
    n->progress = (u8)WORD_PROGRESS(word);
    n->snat_port = f->snat_port;
    copy_address(n->snat, f->snat);
    n->cpu = cpu_id();
    n->kind = kind;
}

/* Makes a flow for its first packet, a SYN or datagram: `flow` of `scratch`. 0: the engine is to do it. */
static __attribute__((noinline)) int make_flow(const struct packet *p, const struct record *r, u32 number, u64 now)
{
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    struct backend *b = map_lookup(&backends, &number);
    void *flow_table = map_lookup(&flows, &zero), *bound_table = map_lookup(&bound, &zero);
    if (!c || !t || !b || !flow_table || !bound_table)
        return 0;
    struct scratch *s = map_lookup(&scratch, &zero);
    if (!s)
        return 0;
    struct news *n = may_make(c, t);
    if (!n)
        return 0;

    u32 at = 0, port = 0;
    if (!name_answers(s, p, b, r, &at)) {
        ring_discard(n, 0);
        return 0;
    }
    s->other.last_seen = now;
    s->other.backend = number;
    s->other.service = r->service;
    s->other.flags = FLOW_BOUND | FLOW_KEPT;
    copy_address(s->other.client, p->src);
    s->other.client_port = p->src_port;
    for (int i = 0; i < MAKE_PROBES; i++) {
        s->answers.snat_port = swap16((u16)(SNAT_PORT_MIN + at));
        long failed = map_update(bound_table, &s->answers, &s->other, BPF_NOEXIST);
        if (!failed) {
            port = s->answers.snat_port;
            break;
        }
        if (failed != -EEXIST)
            break;
        at = next_port(at);
    }
    if (!port) {
        ring_discard(n, 0);
        return 0;
    }
    copy_address(s->name.client, p->src);
    s->name.service = r->service;
    s->name.client_port = p->src_port;
    s->flow.last_seen = now;
    s->flow.backend = number;
    s->flow.flags = FLOW_BOUND | FLOW_KEPT;
    s->flow.progress = p->protocol == PROTO_UDP ? STATE_UDP : STATE_SYN_SENT;
    s->flow.snat_port = (u16)port;
    copy_address(s->flow.snat, s->answers.snat);
    if (map_update(flow_table, &s->name, &s->flow, BPF_NOEXIST)) {
        /* Another processor has another first packet of it, or there is no room. */
        map_delete(bound_table, &s->answers);
        describe(n, &s->name, &s->flow, *word_of(&s->flow), now, NEWS_UNDONE);
        tell(c, n);
        return 0;
    }
    t->made++;
    describe(n, &s->name, &s->flow, *word_of(&s->flow), now, NEWS_OPENED);
    tell(c, n);
    return 1;
}

/* The backend's side of a flow. */
INLINE struct bound *other_side(const struct flow *f, u8 protocol)
{
    u32 zero = 0, number = f->backend;
    struct backend *b = map_lookup(&backends, &number);
    void *table = map_lookup(&bound, &zero);
    if (!b || !table)
        return 0;
    struct bound_key answers = {};
    copy_address(answers.backend, b->address);
    copy_address(answers.snat, f->snat);
    answers.backend_port = b->port;
    answers.snat_port = f->snat_port;
    answers.protocol = protocol;
    return map_lookup(table, &answers);
}

/* The copy on the backend's side follows the flow, also where another processor has changed it meanwhile. */
INLINE void copy_steadiness(struct bound *b, struct flow *f)
{
    u32 word = READ_ONCE(*word_of(f));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        WRITE_ONCE(b->flags, (u8)(FLOW_BOUND | FLOW_KEPT | (word & FLOW_STEADY)));
        word = READ_ONCE(*word_of(f));
    }
}

/* A SYN opens a closing flow again, on the same backend and port: what the engine does when it forgets the flow and makes a new one, if
 * that is the first candidate that others leave it. 0: the engine is to do it. */
static __attribute__((noinline)) int reopen_flow(struct flow *f, const struct packet *p, const struct record *r, u64 now)
{
    u32 zero = 0, number = f->backend;
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    struct backend *b = map_lookup(&backends, &number);
    struct scratch *s = map_lookup(&scratch, &zero);
    void *bound_table = map_lookup(&bound, &zero);
    if (!c || !t || !b || !s || !bound_table)
        return 0;
    u32 before = READ_ONCE(*word_of(f));
    u64 silent = now - READ_ONCE(f->last_seen);
    /* The other processor's clock may be ahead. */
    if (silent >> 63)
        silent = 0;
    if (silent >= r->reopen || !reopens(WORD_PROGRESS(before)))
        return 0;

    struct bound *other = 0;
    u32 at = 0;
    if (!name_answers(s, p, b, r, &at) || !is_address(s->answers.snat, f->snat))
        return 0;
    for (int i = 0; i < MAKE_PROBES; i++) {
        s->answers.snat_port = swap16((u16)(SNAT_PORT_MIN + at));
        struct bound *there = map_lookup(bound_table, &s->answers);
        if (!there)
            return 0;
        if (s->answers.snat_port == f->snat_port) {
            other = there;
            break;
        }
        at = next_port(at);
    }
    if (!other)
        return 0;
    struct news *n = may_make(c, t);
    if (!n)
        return 0;
    u32 after = word_with(before, STATE_SYN_SENT);
    if (__sync_val_compare_and_swap(word_of(f), before, after) != before) {
        ring_discard(n, 0);
        return 0;
    }
    WRITE_ONCE(f->last_seen, now);
    WRITE_ONCE(other->last_seen, now);
    copy_steadiness(other, f);
    t->made++;
    copy_address(s->name.client, p->src);
    s->name.service = r->service;
    s->name.client_port = p->src_port;
    describe(n, &s->name, f, after, now, NEWS_OPENED);
    tell(c, n);
    return 1;
}

/* Takes note of a segment of a kept flow. 0: it could not be written or told, and the segment is the engine's. */
INLINE int note_segment(struct flow *f, struct bound *other, const struct flow_key *name, u32 segment, u32 to_client, u64 now)
{
    u32 word = READ_ONCE(*word_of(f));
    if (advance(WORD_PROGRESS(word), segment, to_client) == WORD_PROGRESS(word))
        return 1;
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    if (!c || READ_ONCE(c->flags) & CONFIG_FROZEN)
        return 0;
    struct news *n = ring_reserve(&news, sizeof(*n), 0);
    if (!n)
        return 0;
    for (int i = 0; i < CHANGE_TRIES; i++) {
        u32 before = READ_ONCE(*word_of(f));
        u32 progress = advance(WORD_PROGRESS(before), segment, to_client);
        if (progress == WORD_PROGRESS(before)) {
            ring_discard(n, 0);
            return 1;
        }
        u32 after = word_with(before, progress);
        if (__sync_val_compare_and_swap(word_of(f), before, after) == before) {
            copy_steadiness(other, f);
            describe(n, name, f, after, now, NEWS_CHANGED);
            tell(c, n);
            return 1;
        }
    }
    ring_discard(n, 0);
    return 0;
}

/* A client's segment or datagram. */
static __attribute__((noinline)) int note_request(struct flow *f, const struct packet *p, u32 service, u64 now)
{
    struct bound *other = other_side(f, p->protocol);
    if (!other)
        return 0;
    struct flow_key name = {};
    copy_address(name.client, p->src);
    name.service = service;
    name.client_port = p->src_port;
    return note_segment(f, other, &name, segment_of(p->flags), 0, now);
}

/* A backend's segment or datagram. */
static __attribute__((noinline)) int note_answer(struct bound *b, const struct packet *p, u64 now)
{
    u32 zero = 0;
    void *table = map_lookup(&flows, &zero);
    if (!table)
        return 0;
    struct flow_key name = {};
    copy_address(name.client, b->client);
    name.service = b->service;
    name.client_port = b->client_port;
    struct flow *f = map_lookup(table, &name);
    /* The client may have another flow by now, which is not yet known on both sides. */
    if (!f || f->snat_port != p->dst_port || !(f->flags & FLOW_KEPT))
        return 0;
    return note_segment(f, b, &name, segment_of(p->flags), 1, now);
}

#endif

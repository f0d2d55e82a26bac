/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * The states of a flow both of whose directions pass: `Progress` of `src/flow/state.rs`, in the byte that it makes of itself there. A
 * test asks both for every byte and segment. A datagram is a plain segment without flags: a UDP flow has one state, and the marks.
 */
#ifndef KOMAINU_STATE_H
#define KOMAINU_STATE_H

#include "helpers.h"

#define STATE_MASK 0x07
#define STATE_SYN_SENT 0
#define STATE_ESTABLISHED 1
#define STATE_CLOSING 2
#define STATE_CLOSED 3
#define STATE_UDP 4
#define PROGRESS_CLIENT_FIN 0x08
#define PROGRESS_BACKEND_FIN 0x10
#define PROGRESS_ANSWERED 0x20
#define PROGRESS_ASSURED 0x40

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

enum segment {
    SEGMENT_SYN,
    SEGMENT_FIN,
    SEGMENT_RST,
    SEGMENT_PLAIN,
};

INLINE u32 segment_of(u32 tcp_flags)
{
    if (tcp_flags & TCP_RST)
        return SEGMENT_RST;
    if ((tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
        return SEGMENT_SYN;
    return tcp_flags & TCP_FIN ? SEGMENT_FIN : SEGMENT_PLAIN;
}

/* The state after a segment. */
INLINE u32 advance(u32 progress, u32 segment, u32 to_client)
{
    const u32 fins = PROGRESS_CLIENT_FIN | PROGRESS_BACKEND_FIN;
    u32 state = progress & STATE_MASK;
    if (to_client)
        progress |= PROGRESS_ANSWERED;
    if (segment == SEGMENT_RST) {
        state = STATE_CLOSED;
    } else if (segment == SEGMENT_FIN) {
        progress |= to_client ? PROGRESS_BACKEND_FIN : PROGRESS_CLIENT_FIN;
        state = (progress & fins) == fins ? STATE_CLOSED : STATE_CLOSING;
    } else if (segment == SEGMENT_PLAIN) {
        if (state == STATE_SYN_SENT && progress & PROGRESS_ANSWERED && !to_client)
            state = STATE_ESTABLISHED;
        else if (state == STATE_CLOSED && (progress & fins) != fins)
            state = progress & fins ? STATE_CLOSING : STATE_ESTABLISHED;
    }
    if (progress & PROGRESS_ANSWERED && (state == STATE_ESTABLISHED || state == STATE_UDP))
        progress |= PROGRESS_ASSURED;
    else if (state != STATE_ESTABLISHED)
        progress &= ~PROGRESS_ASSURED;
    return (progress & ~STATE_MASK) | state;
}

/* Whether a plain segment of either side leaves everything as it is. */
INLINE int is_steady(u32 progress)
{
    return advance(progress, SEGMENT_PLAIN, 0) == progress && advance(progress, SEGMENT_PLAIN, 1) == progress;
}

/* Whether a SYN begins a new flow of the same name. */
INLINE int reopens(u32 progress)
{
    u32 state = progress & STATE_MASK;
    return state == STATE_CLOSING || state == STATE_CLOSED;
}

#endif

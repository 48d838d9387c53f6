//! Text of events, addresses, durations and times.

use std::{fmt::Write, net::SocketAddr, time::Duration};

use crate::api::views::{EventView, PeerView};

/// `10.0.0.1:80`, `[fd00::1]:80`; without the port where the protocol has none.
pub(super) fn peer(peer: PeerView, protocol: &str) -> String {
    if has_ports(protocol) {
        SocketAddr::new(peer.address, peer.port).to_string()
    } else {
        peer.address.to_string()
    }
}

fn has_ports(protocol: &str) -> bool {
    matches!(protocol, "TCP" | "UDP" | "SCTP")
}

/// An event as a sentence.
pub(super) fn sentence(event: &EventView) -> String {
    let mut out = String::new();
    let verb = if event.dropped { "drop" } else { "pass" };
    let written = write_sentence(&mut out, verb, event);
    debug_assert!(written.is_ok(), "writing to a string cannot fail");
    out
}

fn write_sentence(out: &mut String, verb: &str, event: &EventView) -> std::fmt::Result {
    write!(out, "{verb} {} at {}", event.outcome, event.hook)?;
    if event.ifindex != 0 {
        match &event.device {
            Some(device) => write!(out, " ({device}")?,
            None => write!(out, " (device {}", event.ifindex)?,
        }
        match &event.device_pod {
            Some(pod) => write!(out, " of Pod {pod})")?,
            None => out.push(')'),
        }
    }
    match (event.source, event.destination) {
        (Some(source), Some(destination)) => write!(
            out,
            ": {} → {} {}",
            peer(source, &event.protocol),
            peer(destination, &event.protocol),
            event.protocol
        )?,
        _ => out.push_str(": addresses unknown"),
    }
    if event.length != 0 {
        write!(out, ", {} bytes", event.length)?;
    }
    match (&event.source_name, &event.destination_name) {
        (Some(source), Some(destination)) => write!(out, " ({source} → {destination})")?,
        (Some(source), None) => write!(out, " (from {source})")?,
        (None, Some(destination)) => write!(out, " ({destination})")?,
        (None, None) => {}
    }
    write!(out, ". {}", event.text)
}

/// `90s`, `12m`, `3h05m`, `2d04h`.
pub(super) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// UTC time of day of a time since the epoch.
pub(super) fn time_of_day(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs() % 86_400;
    let (hours, minutes, seconds) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}.{:03}", since_epoch.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> EventView {
        EventView {
            timestamp_ns: 0,
            hook: "from_pod".to_owned(),
            outcome: "no_backend".to_owned(),
            dropped: true,
            text: "The service has no ready backend.".to_owned(),
            protocol: "TCP".to_owned(),
            source: Some(PeerView { address: "10.1.0.5".parse().unwrap(), port: 43_210 }),
            destination: Some(PeerView { address: "10.96.0.10".parse().unwrap(), port: 80 }),
            source_name: None,
            destination_name: Some("Service default/web".to_owned()),
            ifindex: 7,
            device: Some("dp0123456789a".to_owned()),
            device_pod: None,
            length: 74,
        }
    }

    #[test]
    fn drop_is_printed_as_a_sentence() {
        assert_eq!(
            sentence(&event()),
            "drop no_backend at from_pod (dp0123456789a): 10.1.0.5:43210 → 10.96.0.10:80 TCP, 74 bytes \
             (Service default/web). The service has no ready backend."
        );
    }

    #[test]
    fn pod_of_the_device_is_named_beside_the_owner_of_the_source_address() {
        let device_pod = Some("default/intruder".to_owned());
        let source_name = Some("Pod default/client".to_owned());
        let event = EventView { source_name, device_pod, ..event() };
        assert_eq!(
            sentence(&event),
            "drop no_backend at from_pod (dp0123456789a of Pod default/intruder): 10.1.0.5:43210 → 10.96.0.10:80 TCP, \
             74 bytes (Pod default/client → Service default/web). The service has no ready backend."
        );
    }

    #[test]
    fn event_of_an_unparsed_packet_has_no_addresses() {
        let event =
            EventView { source: None, destination: None, destination_name: None, device: None, ..event() };
        assert_eq!(
            sentence(&event),
            "drop no_backend at from_pod (device 7): addresses unknown, 74 bytes. The service has no ready backend."
        );
    }

    #[test]
    fn port_is_shown_only_for_protocols_with_ports() {
        let end = PeerView { address: "fd00::1".parse().unwrap(), port: 7 };
        assert_eq!(peer(end, "UDP"), "[fd00::1]:7");
        assert_eq!(peer(end, "ICMPv6"), "fd00::1");
    }

    #[test]
    fn durations_have_at_most_two_units() {
        let text = |seconds| duration(Duration::from_secs(seconds));
        assert_eq!(
            [text(5), text(119), text(600), text(11_100), text(360_000)],
            ["5s", "119s", "10m", "3h05m", "4d04h"]
        );
        assert_eq!(time_of_day(Duration::from_millis(86_400_000 + 3_723_004)), "01:02:03.004");
    }
}

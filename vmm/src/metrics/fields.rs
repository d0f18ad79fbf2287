//! The sections of a line and their fields, with Firecracker's names.
//!
//! A section that no part of a machine counts in is still written, with zeros: what reads the lines need
//! not ask which devices there are.

use super::{Counter, Latency, Value, counters};

counters! {
    /// `api_server`: how long the start took.
    ApiServerMetrics {
        /// From the jailer's start to ours (`--start-time-us`), in µs.
        process_startup_time_us: Value,
        /// CPU time of the same, in µs.
        process_startup_time_cpu_us: Value,
    }

    /// `get_api_requests`.
    GetMetrics {
        /// `GET /`.
        instance_info_count,
        /// `GET /machine-config`.
        machine_cfg_count,
        /// `GET /mmds`.
        mmds_count,
        /// `GET /version`.
        vmm_version_count,
        /// `GET /hotplug/memory`.
        hotplug_memory_count,
    }

    /// `put_api_requests`: how many there were, and how many were refused.
    PutMetrics {
        /// `/actions`
        actions_count,
        /// Refused.
        actions_fails,
        /// `/boot-source`
        boot_source_count,
        /// Refused.
        boot_source_fails,
        /// `/drives`
        drive_count,
        /// Refused.
        drive_fails,
        /// `/logger`
        logger_count,
        /// Refused.
        logger_fails,
        /// `/machine-config`
        machine_cfg_count,
        /// Refused.
        machine_cfg_fails,
        /// `/cpu-config`
        cpu_cfg_count,
        /// Refused.
        cpu_cfg_fails,
        /// `/metrics`
        metrics_count,
        /// Refused.
        metrics_fails,
        /// `/network-interfaces`
        network_count,
        /// Refused.
        network_fails,
        /// `/mmds`
        mmds_count,
        /// Refused.
        mmds_fails,
        /// `/vsock`
        vsock_count,
        /// Refused.
        vsock_fails,
        /// `/pmem`
        pmem_count,
        /// Refused.
        pmem_fails,
        /// `/serial`
        serial_count,
        /// Refused.
        serial_fails,
        /// `/hotplug/memory`
        hotplug_memory_count,
        /// Refused.
        hotplug_memory_fails,
    }

    /// `patch_api_requests`: how many there were, and how many were refused.
    PatchMetrics {
        /// `/drives`
        drive_count,
        /// Refused.
        drive_fails,
        /// `/network-interfaces`
        network_count,
        /// Refused.
        network_fails,
        /// `/machine-config`
        machine_cfg_count,
        /// Refused.
        machine_cfg_fails,
        /// `/mmds`
        mmds_count,
        /// Refused.
        mmds_fails,
        /// `/hotplug/memory`
        hotplug_memory_count,
        /// Refused.
        hotplug_memory_fails,
        /// `/pmem`
        pmem_count,
        /// Refused.
        pmem_fails,
    }

    /// `deprecated_api`.
    DeprecatedApiMetrics {
        /// Requests with a deprecated field.
        deprecated_http_api_calls,
    }

    /// `latencies_us`: how long the last one took, in µs.
    LatencyMetrics {
        /// A full snapshot, as the API saw it.
        full_create_snapshot: Value,
        /// A difference snapshot, as the API saw it.
        diff_create_snapshot: Value,
        /// Loading a snapshot, as the API saw it.
        load_snapshot: Value,
        /// Pausing, as the API saw it.
        pause_vm: Value,
        /// Resuming, as the API saw it.
        resume_vm: Value,
        /// A full snapshot itself.
        vmm_full_create_snapshot: Value,
        /// A difference snapshot itself.
        vmm_diff_create_snapshot: Value,
        /// Loading a snapshot itself.
        vmm_load_snapshot: Value,
        /// Pausing itself.
        vmm_pause_vm: Value,
        /// Resuming itself.
        vmm_resume_vm: Value,
    }

    /// `logger`.
    LoggerMetrics {
        /// Metric lines that nobody took in time.
        missed_metrics_count,
        /// Metric lines that could not be written.
        metrics_fails,
        /// Log lines that nobody took in time, or that could not be written.
        missed_log_count,
        /// Log lines that a call site's rate limit held back.
        rate_limited_log_count,
    }

    /// `mmds`: the metadata service.
    MmdsMetrics {
        /// Frames accepted.
        rx_accepted,
        /// Frames accepted that were in error.
        rx_accepted_err,
        /// Frames accepted that were unusual.
        rx_accepted_unusual,
        /// Frames that are not Ethernet's.
        rx_bad_eth,
        /// Requests with an invalid token.
        rx_invalid_token,
        /// Requests without a token.
        rx_no_token,
        /// Frames received.
        rx_count,
        /// Bytes sent.
        tx_bytes,
        /// Sending attempts.
        tx_count,
        /// Sending attempts that failed.
        tx_errors,
        /// Frames sent.
        tx_frames,
        /// TCP connections opened.
        connections_created,
        /// TCP connections closed.
        connections_destroyed,
    }

    /// `seccomp`. A violation ends the process (exit code 159), so a line never counts one.
    SeccompMetrics {
        /// Violations.
        num_faults: Value,
    }

    /// `signals`. Those that end the process are never counted in a line.
    SignalMetrics {
        /// SIGBUS.
        sigbus: Value,
        /// SIGSEGV.
        sigsegv: Value,
        /// SIGXFSZ.
        sigxfsz: Value,
        /// SIGXCPU.
        sigxcpu: Value,
        /// SIGPIPE.
        sigpipe,
        /// SIGHUP.
        sighup: Value,
        /// SIGILL.
        sigill: Value,
    }

    /// `vcpu`: exits to user space, of all vCPUs.
    VcpuMetrics {
        /// Reads of a port.
        exit_io_in,
        /// Writes to a port.
        exit_io_out,
        /// Reads of a memory window.
        exit_mmio_read,
        /// Writes to a memory window.
        exit_mmio_write,
        /// Exits after which the guest cannot go on.
        failures,
        /// Failed notifications of a pause.
        kvmclock_ctrl_fails,
        /// How long a port's read took.
        exit_io_in_agg: Latency,
        /// How long a port's write took.
        exit_io_out_agg: Latency,
        /// How long a window's read took.
        exit_mmio_read_agg: Latency,
        /// How long a window's write took.
        exit_mmio_write_agg: Latency,
    }

    /// `vmm`.
    VmmMetrics {
        /// Panics: never more than none, as one ends the process.
        panic_count: Value,
    }

    /// `interrupts`: of virtio devices.
    InterruptMetrics {
        /// Interrupts for used buffers.
        triggers,
        /// Interrupts for changed configurations.
        config_updates,
    }

    /// `uart`: the first serial port.
    UartMetrics {
        /// Errors.
        error_count,
        /// Flushes.
        flush_count,
        /// Reads of a register that does not exist.
        missed_read_count,
        /// Writes to a register that does not exist, and bytes that nobody took.
        missed_write_count,
        /// Reads.
        read_count,
        /// Writes.
        write_count,
        /// Bytes that a rate limit dropped.
        rate_limiter_dropped_bytes,
    }

    /// `i8042`: the keyboard controller.
    I8042Metrics {
        /// Errors.
        error_count,
        /// Reads of a register that does not exist.
        missed_read_count,
        /// Writes to a register that does not exist.
        missed_write_count,
        /// Reads.
        read_count,
        /// Resets asked for.
        reset_count,
        /// Writes.
        write_count,
    }

    /// `block` and `block_<drive_id>`.
    BlockMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Accesses to the configuration space that failed.
        cfg_fails,
        /// Turns without a request.
        no_avail_buffer,
        /// Turns that failed.
        event_fails,
        /// Requests that could not be carried out.
        execute_fails,
        /// Malformed requests.
        invalid_reqs_count,
        /// Flushes.
        flush_count,
        /// Doorbells.
        queue_event_count,
        /// Turns after a rate limit.
        rate_limiter_event_count,
        /// Changes by the operator.
        update_count,
        /// Changes by the operator that failed.
        update_fails,
        /// Bytes read.
        read_bytes,
        /// Bytes written.
        write_bytes,
        /// Reads.
        read_count,
        /// Writes.
        write_count,
        /// How long a read took.
        read_agg: Latency,
        /// How long a write took.
        write_agg: Latency,
        /// Requests that a rate limit held back.
        rate_limiter_throttled_events,
        /// Requests that a full io_uring held back.
        io_engine_throttled_events,
        /// Requests left for another turn.
        remaining_reqs_count,
    }

    /// `net` and `net_<iface_id>`.
    NetMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Accesses to the configuration space that failed.
        cfg_fails,
        /// Packets for which the guest had no buffer.
        no_rx_avail_buffer,
        /// Turns without a packet to send.
        no_tx_avail_buffer,
        /// Turns that failed.
        event_fails,
        /// Doorbells of receive queues.
        rx_queue_event_count,
        /// Turns after the receive limit.
        rx_event_rate_limiter_count,
        /// Packets that the receive limit held back.
        rx_rate_limiter_throttled,
        /// Wake-ups by the tap.
        rx_tap_event_count,
        /// Bytes received.
        rx_bytes_count,
        /// Packets received.
        rx_packets_count,
        /// Packets that could not be received.
        rx_fails,
        /// Turns that received.
        rx_count,
        /// Failed reads of the tap.
        tap_read_fails,
        /// Failed writes to the tap.
        tap_write_fails,
        /// How long a write to the tap took.
        tap_write_agg: Latency,
        /// Bytes sent.
        tx_bytes_count,
        /// Malformed packets.
        tx_malformed_frames,
        /// Packets that could not be sent.
        tx_fails,
        /// Turns that sent.
        tx_count,
        /// Packets sent.
        tx_packets_count,
        /// Doorbells of transmit queues.
        tx_queue_event_count,
        /// Turns after the transmit limit.
        tx_rate_limiter_event_count,
        /// Packets that the transmit limit held back.
        tx_rate_limiter_throttled,
        /// Packets with another card's address.
        tx_spoofed_mac_count,
        /// Packets left for another turn.
        tx_remaining_reqs_count,
    }

    /// `vsock`.
    VsockMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Accesses to the configuration space that failed.
        cfg_fails,
        /// Turns of the receive queue that failed.
        rx_queue_event_fails,
        /// Turns of the transmit queue that failed.
        tx_queue_event_fails,
        /// Turns of the event queue that failed.
        ev_queue_event_fails,
        /// Turns of the multiplexer that failed.
        muxer_event_fails,
        /// Turns of a connection that failed.
        conn_event_fails,
        /// Doorbells of the receive queue.
        rx_queue_event_count,
        /// Doorbells of the transmit queue.
        tx_queue_event_count,
        /// Bytes received by the guest.
        rx_bytes_count,
        /// Bytes sent by the guest.
        tx_bytes_count,
        /// Packets received by the guest.
        rx_packets_count,
        /// Packets sent by the guest.
        tx_packets_count,
        /// Connections opened.
        conns_added,
        /// Connections ended by force.
        conns_killed,
        /// Connections closed.
        conns_removed,
        /// Rounds over the connections to be ended by force.
        killq_resync,
        /// Failed flushes of a connection's buffer.
        tx_flush_fails,
        /// Failed writes to a host's socket.
        tx_write_fails,
        /// Failed reads of a host's socket.
        rx_read_fails,
    }

    /// `entropy`.
    EntropyMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Requests that failed.
        entropy_event_fails,
        /// Requests.
        entropy_event_count,
        /// Bytes given.
        entropy_bytes,
        /// Times that the host had none.
        host_rng_fails,
        /// Requests that a rate limit held back.
        entropy_rate_limiter_throttled,
        /// Turns after a rate limit.
        rate_limiter_event_count,
    }

    /// `balloon`.
    BalloonMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Inflations.
        inflate_count,
        /// Statistics received.
        stats_updates_count,
        /// Statistics that could not be read.
        stats_update_fails,
        /// Deflations.
        deflate_count,
        /// Turns that failed.
        event_fails,
        /// Free page reports.
        free_page_report_count,
        /// Bytes that reports freed.
        free_page_report_freed,
        /// Reports that failed.
        free_page_report_fails,
        /// Free page hints.
        free_page_hint_count,
        /// Bytes that hints freed.
        free_page_hint_freed,
        /// Hints that failed.
        free_page_hint_fails,
    }

    /// `memory_hotplug`: the memory device.
    MemoryHotplugMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Turns that failed.
        queue_event_fails,
        /// Doorbells.
        queue_event_count,
        /// How long a plug took.
        plug_agg: Latency,
        /// Plugs.
        plug_count,
        /// Bytes plugged.
        plug_bytes,
        /// Plugs that failed.
        plug_fails,
        /// How long an unplug took.
        unplug_agg: Latency,
        /// Unplugs.
        unplug_count,
        /// Bytes unplugged.
        unplug_bytes,
        /// Unplugs that failed.
        unplug_fails,
        /// Unplugs whose memory the host did not take back.
        unplug_discard_fails,
        /// How long an unplug of everything took.
        unplug_all_agg: Latency,
        /// Unplugs of everything.
        unplug_all_count,
        /// Unplugs of everything that failed.
        unplug_all_fails,
        /// How long a question for a state took.
        state_agg: Latency,
        /// Questions for a state.
        state_count,
        /// Questions for a state that failed.
        state_fails,
    }

    /// `pmem` and `pmem_<id>`.
    PmemMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Accesses to the configuration space that failed.
        cfg_fails,
        /// Turns that failed.
        event_fails,
        /// Doorbells.
        queue_event_count,
        /// Requests that a rate limit held back.
        rate_limiter_throttled_events,
        /// Turns after a rate limit.
        rate_limiter_event_count,
    }

    /// `vhost_user_<id>`: times in µs.
    VhostUserMetrics {
        /// Starts by the driver that failed.
        activate_fails,
        /// Accesses to the configuration space that failed.
        cfg_fails,
        /// How long it took to connect and negotiate.
        init_time_us: Value,
        /// How long it took to start.
        activate_time_us: Value,
        /// How long the last change of its configuration took.
        config_change_time_us: Value,
    }
}

impl LoggerMetrics {
    /// All zero; for the log, which has no owner but the process.
    pub const fn new() -> Self {
        Self {
            missed_metrics_count: Counter::new(),
            metrics_fails: Counter::new(),
            missed_log_count: Counter::new(),
            rate_limited_log_count: Counter::new(),
        }
    }
}

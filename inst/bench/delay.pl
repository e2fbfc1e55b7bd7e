#!/usr/bin/perl
# Stands for an ssh to a host that is far away, with a constant delay each way:
#   delay.pl seconds [options of ssh] host command
# runs the command here and passes on what goes in and out when its time has come.
use strict;
use warnings;
use Time::HiRes qw(time);
use IO::Handle;
use Fcntl;

my $delay = shift @ARGV;
my $command = pop @ARGV;
pipe(my $in_read, my $in_write) or die;
pipe(my $out_read, my $out_write) or die;
my $pid = fork() // die;
if (!$pid) {
  open(STDIN, '<&', $in_read) or die;
  open(STDOUT, '>&', $out_write) or die;
  close $_ for $in_read, $in_write, $out_read, $out_write;
  exec '/bin/sh', '-c', $command or die;
}
close $in_read;
close $out_write;
$SIG{PIPE} = 'IGNORE';

# Each way: where from, where to, what is on it and until when.
my @ways = ([\*STDIN, $in_write, []], [$out_read, \*STDOUT, []]);
my @open = (1, 1);
while ($open[1] || @{ $ways[1][2] }) {
  my ($bits, $next) = ('', undef);
  for my $i (0, 1) {
    vec($bits, fileno($ways[$i][0]), 1) = 1 if $open[$i];
    my $first = $ways[$i][2][0];
    $next = $first->[0] if $first && (!defined $next || $first->[0] < $next);
  }
  my $wait = defined $next ? $next - time : undef;
  $wait = 0 if defined $wait && $wait < 0;
  my $ready = select(my $readable = $bits, undef, undef, $wait);
  for my $i (0, 1) {
    my ($from, $to, $queue) = @{ $ways[$i] };
    if ($ready > 0 && $open[$i] && vec($readable, fileno($from), 1)) {
      my $read = sysread($from, my $bytes, 65536);
      if ($read) { push @$queue, [time + $delay, $bytes] }
      else { $open[$i] = 0; push @$queue, [time + $delay, undef] }
    }
    while (@$queue && $queue->[0][0] <= time) {
      my $bytes = (shift @$queue)->[1];
      if (!defined $bytes) { close $to; next }
      while (length $bytes) {
        my $wrote = syswrite($to, $bytes);
        last unless defined $wrote;
        substr($bytes, 0, $wrote, '');
      }
    }
  }
}
waitpid($pid, 0);

"""The tables of snapshots. Room is left on the pages of the first: claim and settle update a row many times."""

import django.contrib.postgres.indexes
import django.db.models.deletion
import django.db.models.functions.datetime
import flows.models
from django.db import migrations, models


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('accounts', '0001_initial'),
        ('devboxes', '0008_origin'),
        ('hosts', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='DiskSnapshot',
            fields=[
                ('id', flows.models.IdField(primary_key=True, serialize=False)),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False)),
                ('completed_at', models.DateTimeField(blank=True, editable=False, null=True)),
                ('step', models.TextField()),
                ('step_since', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False)),
                ('attempts', models.IntegerField(db_default=0, editable=False)),
                ('wake_at', models.DateTimeField(blank=True, db_default=django.db.models.functions.datetime.Now(), editable=False, null=True)),
                ('wakes', models.IntegerField(db_default=0, editable=False)),
                ('lease', models.TextField(blank=True, editable=False, null=True)),
                ('lease_until', models.DateTimeField(blank=True, editable=False, null=True)),
                ('fence', models.BigIntegerField(db_default=0, editable=False)),
                ('deadline_at', models.DateTimeField(blank=True, editable=False, null=True)),
                ('error_code', models.TextField(blank=True, editable=False, null=True)),
                ('error_detail', models.TextField(blank=True, editable=False, null=True)),
                ('name', models.TextField(blank=True, default='')),
                ('commit_message', models.TextField(blank=True, default='')),
                ('metadata', models.JSONField(blank=True, default=dict)),
                ('public', models.BooleanField(db_default=False, default=False, help_text='Every account may create from it.')),
                ('status', models.TextField(choices=[('in_progress', 'in_progress'), ('error', 'error'), ('complete', 'complete'), ('deleted', 'deleted')], default='in_progress')),
                ('error_kind', models.TextField(blank=True, db_default='', default='')),
                ('error_message', models.TextField(blank=True, db_default='', default='')),
                ('image_id', models.TextField(blank=True, db_default='', default='')),
                ('base_bytes', models.BigIntegerField(db_default=0, default=0, help_text="What the devbox's disk was cloned with.")),
                ('launch_parameters', models.JSONField(default=dict, help_text='Of its devbox: what a copy is like unless told.')),
                ('size_bytes', models.BigIntegerField(blank=True, help_text='Of the disk, beyond its image.', null=True)),
                ('freeze_ms', models.FloatField(blank=True, help_text='How long the devbox stood still for it.', null=True)),
                ('frozen', models.BooleanField(blank=True, help_text='Whether its devbox came to a halt for it.', null=True)),
                ('taken_at', models.DateTimeField(blank=True, null=True)),
                ('upload', models.JSONField(blank=True, help_text='How far it has come on its way to S3.', null=True)),
                ('sent_bytes', models.BigIntegerField(db_default=0, default=0)),
                ('object_key', models.TextField(blank=True, db_default='', default='')),
                ('object_size', models.BigIntegerField(blank=True, null=True)),
                ('sha256', models.TextField(blank=True, db_default='', default='', help_text="The seal: of its parts' digests.")),
                ('part_bytes', models.IntegerField(db_default=0, default=0)),
                ('verified_parts', models.IntegerField(db_default=0, default=0, help_text='How many parts were read back.')),
                ('stored_at', models.DateTimeField(blank=True, help_text='When all of it had been read back from S3.', null=True)),
                ('account', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='accounts.account')),
                ('devbox', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='snapshots', to='devboxes.devbox')),
                ('host', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='hosts.host')),
            ],
            options={
                'verbose_name': 'snapshot',
                'abstract': False,
            },
        ),
        migrations.CreateModel(
            name='DiskSnapshotHost',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('host', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='+', to='hosts.host')),
                ('snapshot', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='hosts', to='snapshots.disksnapshot')),
            ],
        ),
        migrations.AddIndex(
            model_name='disksnapshot',
            index=models.Index(condition=models.Q(('wake_at__isnull', False)), fields=['wake_at'], name='snapshots_disksnapshot_due'),
        ),
        migrations.AddIndex(
            model_name='disksnapshot',
            index=models.Index(models.F('account'), models.OrderBy(models.F('created_at'), descending=True), models.OrderBy(models.F('id'), descending=True), name='snapshots_disksnapshot_list'),
        ),
        migrations.AddIndex(
            model_name='disksnapshot',
            index=models.Index(models.OrderBy(models.F('created_at'), descending=True), models.OrderBy(models.F('id'), descending=True), condition=models.Q(('public', True)), name='snapshots_disksnapshot_public'),
        ),
        migrations.AddIndex(
            model_name='disksnapshot',
            index=django.contrib.postgres.indexes.GinIndex(fields=['metadata'], name='snapshots_disksnapshot_meta', opclasses=['jsonb_path_ops']),
        ),
        migrations.AddConstraint(
            model_name='disksnapshot',
            constraint=models.CheckConstraint(condition=models.Q(('step__in', ['take', 'send', 'seal', 'verify', 'kept', 'discard', 'failed', 'delete', 'deleted'])), name='snapshots_disksnapshot_step'),
        ),
        migrations.AddConstraint(
            model_name='disksnapshot',
            constraint=models.CheckConstraint(condition=models.Q(('status__in', ('in_progress', 'error', 'complete', 'deleted'))), name='snapshots_disksnapshot_status'),
        ),
        migrations.AddConstraint(
            model_name='disksnapshothost',
            constraint=models.UniqueConstraint(fields=('snapshot', 'host'), name='snapshots_host_once'),
        ),
        migrations.RunSQL(
            "ALTER TABLE snapshots_disksnapshot SET (fillfactor = 70)",
            "ALTER TABLE snapshots_disksnapshot RESET (fillfactor)",
        ),
    ]
